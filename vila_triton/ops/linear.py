"""The int4 leaf type, and the matrix product with a weight that is either a plain tensor or int4."""
# pyright: reportInvalidTypeForm=false

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vila_triton.formats import NIBBLES, pack_rows, unpack_rows
from vila_triton.registry import OneOf, Sizes, op

from .domain import DTYPES, draw, name_of, wide
from .shapes import axes


@dataclass(frozen=True)
class Int4:
    """A weight [n, k] in 4 bits: w[i, j] = (code[i, j] - zeros[i, j // group]) * scales[i, j // group].

    qweight  [n, k/8] int32   nibble i (from the low end) of word c is code[:, 8c + i], 0 to 15
    scales   [n, G]           G = k / group
    zeros    [n, G]           the code that stands for 0: a whole number 0 to 15, kept in the dtype of scales
    """

    qweight: Any  # a Tensor, or whatever a params tree of declarations holds in its place
    scales: Any
    zeros: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.qweight.shape[0], self.qweight.shape[1] * NIBBLES

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]


def check_int4(k: int, group: int) -> None:
    """ValueError unless a weight of k columns can be cut into groups of whole words."""
    if k % NIBBLES or group <= 0 or group % NIBBLES or k % group:
        raise ValueError(f"int4 weight: k = {k} and group = {group}, but group must divide k and be a multiple of 8")


def codes(w: Int4) -> Tensor:
    """The 4-bit codes as int32, [n, k]."""
    return unpack_rows(w.qweight)


def dequantize(w: Int4, dtype: torch.dtype) -> Tensor:
    """The weight as a plain tensor [n, k] of the given dtype; codes minus zero first, then times scale."""
    q = rearrange(codes(w), "n (G i) -> n G i", i=w.group)
    scales, zeros = (x[..., None].to(dtype) for x in (w.scales, w.zeros))  # [n, G, 1]
    return ((q.to(dtype) - zeros) * scales).flatten(-2)


def quantize(w: Tensor, group: int) -> Int4:
    """Round w [n, k] to the nearest of 16 levels per group, whose range always includes 0.

    Errors: ValueError if group does not divide k, is not a multiple of 8, or w is not finite.
    """
    check_int4(w.shape[1], group)
    if not torch.isfinite(w).all():
        raise ValueError("int4 weight: cannot quantize a weight that holds NaN or infinity")
    x = rearrange(w.float(), "n (G i) -> n G i", i=group)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    # The scale is rounded before it is used, so that the codes are nearest under the scale that is stored.
    scales = ((high - low) / 15).clamp(min=torch.finfo(torch.float16).tiny).to(w.dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    q = ((x / scales.float()).round() + zeros).clamp(0, 15).to(torch.int32)
    return Int4(pack_rows(q.flatten(-2)), scales[..., 0], zeros[..., 0].to(w.dtype))


@op
def int4_matmul(x: Tensor, w: Int4) -> Tensor:
    """x · wᵀ with w in 4 bits: x [..., k], w [n, k] -> [..., n], in x's dtype. Lin et al. 2023 (AWQ, W4A16)."""
    return F.linear(wide(x), wide(dequantize(w, x.dtype))).to(x.dtype)


@int4_matmul.requires
def _(x: Tensor, w: Int4) -> None:
    sizes = axes(
        "int4_matmul",
        x=(x, "... k"),
        **{"w.qweight": (w.qweight, "n words"), "w.scales": (w.scales, "n G"), "w.zeros": (w.zeros, "n G")},
    )
    check_int4(NIBBLES * sizes["words"], w.group)
    if w.qweight.dtype != torch.int32:
        raise ValueError(f"int4_matmul: w.qweight is {w.qweight.dtype}, expected torch.int32")
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"int4_matmul: x has {x.shape[-1]} columns, but w is {list(w.shape)}")


@int4_matmul.inputs
def _(
    m: Sizes(1, 40),
    n: Sizes(1, 80),
    G: Sizes(1, 5),
    group: OneOf(32, 64, 128),
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    q = torch.randint(0, 16, (n, G * group), generator=rng)
    scales = (torch.rand(n, G, generator=rng) + 0.5) / 15
    zeros = torch.randint(0, 16, (n, G), generator=rng)
    values = (pack_rows(q).to(device), *(x.to(device, getattr(torch, dtype)) for x in (scales, zeros)))
    return draw(m, G * group, dtype=dtype, rng=rng, device=device), Int4(*values)


@int4_matmul.sizes("m")
def _(x, w):
    n, k = w.shape
    return dict(m=x.shape[:-1].numel(), n=n, G=k // w.group, group=w.group, dtype=name_of(x.dtype))


@int4_matmul.costs
def _(m, n, G, group, dtype):
    k, size = G * group, getattr(torch, dtype).itemsize
    return 2 * m * n * k, n * k // 2 + (2 * n * G + m * k + m * n) * size


@op
def linear(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None) -> Tensor:
    """x · wᵀ + bias: x [..., k], w [n, k] a plain tensor or `Int4`, bias [n] -> [..., n]."""
    if isinstance(w, Int4):
        y = int4_matmul(x, w)
        return y if bias is None else y + bias
    return F.linear(x, w, bias)


@linear.requires
def _(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None) -> None:
    weight = {"w": (w, "n k")} if isinstance(w, Tensor) else {"w.qweight": (w.qweight, "n words")}
    axes("linear", x=(x, "... k"), **weight, **({} if bias is None else {"bias": (bias, "n")}))


@linear.inputs
def _(m: Sizes(1, 40), n: Sizes(1, 80), k: Sizes(1, 200), dtype: DTYPES, *, rng: torch.Generator, device: str):
    x, w, bias = (draw(*s, dtype=dtype, rng=rng, device=device) for s in ((m, k), (n, k), (n,)))
    return x, w, bias


@linear.sizes("m")
def _(x, w, bias=None):
    n, k = w.shape
    return dict(m=x.shape[:-1].numel(), n=n, k=k, dtype=name_of(x.dtype))


@linear.costs
def _(m, n, k, dtype):
    return 2 * m * n * k, (m * k + n * k + n + m * n) * getattr(torch, dtype).itemsize
