"""A weight in 4 bits: the tensors of it, from a plain weight or from codes, and back."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from .int4_tiles import pack_tiles, unpack_tiles
from .shapes import check_axes, check_floating

ROUNDINGS = ("sub", "fma")
SMALLEST_SCALE = 2.0**-24  # above 0 in float16


@dataclass(frozen=True)
class Int4:
    """A weight [n, k] in 4 bits: w[i, j] = (code[i, j] - zeros[j // group_size, i]) · scales[j // group_size, i].

    qweight     [ceil(n/16), ceil(k/64), 32, 4] int32: the codes, 0 to 15, packed by `int4_tiles.pack_tiles`
    scales      [k / group_size, n]
    zeros       [k / group_size, n]: the code that stands for 0, a whole number 0 to 15 in the dtype of scales
    group_size  columns that share a scale and a zero point; k: one scale a row
    rounding    how a dequantized weight is rounded to the dtype of x:
                "sub"  (code - zero) · scale, rounded once; code - zero is exact
                "fma"  code · scale + shift, rounded once; shift = -zero · scale has been rounded, as in llm-awq
                A kernel that multiplies sums of (code - zero) · x by the scale rounds no weight: it is for "sub" only.
    """

    qweight: Any  # a Tensor, or the `ParameterSpec` of one
    scales: Any
    zeros: Any
    group_size: int
    rounding: Literal["sub", "fma"] = "sub"

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], self.scales.shape[0] * self.group_size

    @staticmethod
    def pack(weight: Tensor, group_size: int) -> "Int4":
        """Quantize a weight [n, k] by rounding to nearest, with 16 levels a group whose range always includes 0.

        Scales and zeros have the weight's dtype. On the meta device shapes and dtypes alone are worked out. Raises
        ValueError if the weight is no matrix of floating-point numbers, if its k columns cannot be divided into groups
        of this size (see `check_int4_shape`), or if a number is not finite.
        """
        _, k = check_axes("Int4.pack", weight=(weight, "n k")).values()
        check_floating("Int4.pack", weight=weight)
        check_int4_shape(k, group_size)
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError("int4 weight: cannot quantize a weight that holds NaN or infinity")
        x = rearrange(weight.detach().float(), "n (G i) -> n G i", i=group_size)
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        # The scale is rounded before it is used, so that the codes are nearest under the scale that is stored.
        scales = scale_for_range(high - low, weight.dtype)
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = ((x / scales.float()).round() + zeros).clamp(0, 15).to(torch.int32)
        scales, zeros = (rearrange(y, "n G 1 -> G n").to(weight.dtype).contiguous() for y in (scales, zeros))
        return Int4(pack_tiles(codes.flatten(-2)), scales, zeros, group_size)

    @staticmethod
    def from_codes(codes: Tensor, scales: Tensor, zeros: Tensor, rounding: Literal["sub", "fma"] = "sub") -> "Int4":
        """The weight of codes [n, k] that another quantizer has chosen, 0 to 15 in any integer dtype, with its scales
        and zeros [G, n], G groups of k / G columns; zeros may be integers, too.

        Raises ValueError for shapes that are not those of one weight, for groups as `pack` does, for codes or zeros
        that are not whole numbers from 0 to 15, and for scales that are not finite.
        """
        sizes = check_axes("Int4.from_codes", codes=(codes, "n k"), scales=(scales, "G n"), zeros=(zeros, "G n"))
        check_floating("Int4.from_codes", scales=scales)
        k, G = sizes["k"], sizes["G"]
        if not G or k % G:
            raise ValueError(f"Int4.from_codes: {G} rows of scales do not divide k = {k} columns into groups")
        check_int4_shape(k, k // G)
        check_rounding("Int4.from_codes", rounding)
        check_values("Int4.from_codes", scales, codes=codes, zeros=zeros)
        return Int4(pack_tiles(codes), scales.contiguous(), zeros.to(scales.dtype).contiguous(), k // G, rounding)


def check_values(name: str, scales: Tensor, **whole_numbers: Tensor) -> None:
    """Raise ValueError unless scales are finite, and codes and zeros whole numbers from 0 to 15; on the meta device
    nothing is looked at.
    """
    for key, x in whole_numbers.items():
        if not x.is_meta and not ((x == x.long()) & (x >= 0) & (x <= 15)).all():
            raise ValueError(f"{name}: {key} are not all whole numbers from 0 to 15")
    if not scales.is_meta and not torch.isfinite(scales).all():
        raise ValueError(f"{name}: scales hold NaN or infinity")


def check_int4_shape(k: int, group_size: int) -> None:
    """Raise ValueError unless a weight of k columns can be divided into groups of this size."""
    if k <= 0 or k % 8 or group_size <= 0 or k % group_size or (group_size % 16 and group_size != k):
        raise ValueError(
            f"int4 weight: k = {k} and group_size = {group_size}, "
            "but k must be a positive multiple of 8, and group_size divide k and be a multiple of 16, unless it is k"
        )


def check_rounding(op_name: str, rounding: str, name: str = "rounding") -> None:
    """Raise ValueError unless `rounding` is one of `ROUNDINGS`."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op_name}: {name} is {rounding!r}, expected one of {', '.join(ROUNDINGS)}")


def unpack_codes(w: Int4) -> Tensor:
    """The 4-bit codes as int32, [n, k]."""
    return unpack_tiles(w.qweight, *w.shape)


def apply_scale_and_zero(q: Tensor, scales: Tensor, zeros: Tensor, rounding: str) -> Tensor:
    """Codes, scales and zeros of one dtype and of shapes that broadcast -> weights, rounded as `Int4.rounding` says."""
    if rounding == "sub":
        return (q - zeros) * scales
    shifts = -(zeros * scales)
    return (q.double() * scales.double() + shifts.double()).to(q.dtype)


def dequantize(w: Int4, dtype: torch.dtype) -> Tensor:
    """The weight as a plain tensor [n, k] of a dtype."""
    q = rearrange(unpack_codes(w), "n (G i) -> n G i", i=w.group_size)
    scales, zeros = (rearrange(x, "G n -> n G 1").to(dtype) for x in (w.scales, w.zeros))
    return apply_scale_and_zero(q.to(dtype), scales, zeros, w.rounding).flatten(-2)


def scale_for_range(value_range: Tensor, dtype: torch.dtype) -> Tensor:
    """The step between sixteen levels that span a range, rounded to the dtype but never to 0 in float16."""
    exact = (value_range / 15).clamp(min=SMALLEST_SCALE)
    nearest = exact.to(dtype)
    # Among the least numbers of float16 the nearest may be a third too small: then the levels would not reach the ends.
    return torch.where(nearest.float() < exact * (1 - 2**-10), (nearest.float() + SMALLEST_SCALE).to(dtype), nearest)
