"""The layouts of int4 linears in checkpoints, each a pair of pure functions to and from `Int4`.

    vila-triton  qweight [n/16, k/64, 32, 4] int32  scales [G, n]    zeros [G, n]             `Int4` as it is
    awq-gemm     qweight [k, n/8] int32             scales [G, n]    qzeros [G, n/8] int32    AutoAWQ, version "gemm"
    awq-v1       qweight [n, k/8] int32             scales [n, 8W]   qzeros [n, W] int32      llm-awq v1, AutoAWQ "gemv"
    awq-v2       qweight [n/4, k] int16             scales [8W, n]   scaled_zeros [8W, n]     llm-awq v2 (AutoAWQ
                 "gemv_fast" calls the last `qzeros`)

G = k / group_size; llm-awq pads G to 8W rows of zeros. A scaled zero is -(scale * zero), rounded; its zero point is
whole and comes back exactly, or the checkpoint is refused. Tensors may be on torch's meta device: then only shapes and
dtypes are worked out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vila_triton.ops import Int4
from vila_triton.ops.int4_tiles import CODES_PER_WORD, TILE_K, TILE_N, pack_tiles, tiled_shape, unpack_tiles
from vila_triton.ops.int4_weight import check_int4_shape

from .int4_packing import (
    pack_awq_gemm,
    pack_awq_gemv,
    pack_awq_v2,
    padded_scale_rows,
    unpack_awq_gemm,
    unpack_awq_gemv,
    unpack_awq_v2,
)

LinearTensors = Mapping[str, Tensor]
CODES_PER_BLOCK = 1 << 20  # codes unpacked at a time, so that little memory is held beside the weight
LLM_AWQ_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Layout:
    """A layout: `read` turns the tensors of a linear into an `Int4`, `write` does the reverse. Both raise ValueError.

    `read` also takes the group size from the config, which the native layout cannot infer from shapes: -1 for one group
    a row, 0 if the config says nothing. `rounding` is that of the kernels made for the layout (`Int4.rounding`); a
    config may say otherwise. `tensor_names`: the last parts of the tensors' names.
    """

    name: str
    tensor_names: tuple[str, ...]
    rounding: Literal["sub", "fma"]
    read: Callable[[LinearTensors, int], Int4]
    write: Callable[[Int4], dict[str, Tensor]]


def repack(n: int, k: int, unpack: Callable[[slice], Tensor], pack: Callable[[Tensor], Tensor], dim: int = 0) -> Tensor:
    """Convert codes [n, k] from one packing to another, a block of outputs at a time.

    unpack: outputs as a slice -> their codes; pack: codes -> packed; dim: the dimension of the outputs in the result.
    """
    step = max(TILE_N, CODES_PER_BLOCK // k // TILE_N * TILE_N)
    return torch.cat([pack(unpack(slice(i, min(i + step, n)))) for i in range(0, n, step)], dim)


def row_codes(w: Int4, rows: slice) -> Tensor:
    """Unpack the codes [rows, k] of some outputs, the first of which begins a tile."""
    packed = w.qweight[rows.start // TILE_N : -(-rows.stop // TILE_N)]
    return unpack_tiles(packed, rows.stop - rows.start, w.shape[1])


def integer_zeros(w: Int4) -> Tensor:
    """The zero points as int32 [G, n]. Errors: ValueError if one is not a whole number from 0 to 15."""
    zeros = w.zeros.to(torch.int32)
    if not w.zeros.is_meta and not ((zeros == w.zeros) & (zeros >= 0) & (zeros < 16)).all():
        raise ValueError("its zeros are not all whole numbers from 0 to 15, which is all that this layout holds")
    return zeros


def describe_shapes(tensors: LinearTensors) -> str:
    """Names and shapes of tensors for an error."""
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def not_one_weight(tensors: LinearTensors) -> ValueError:
    """The error for tensors whose shapes do not belong together."""
    return ValueError(f"{describe_shapes(tensors)} are not one weight")


def read_native(tensors: LinearTensors, group_size: int) -> Int4:
    """Read a linear in the native layout. Errors: ValueError."""
    qweight, scales, zeros = (tensors[name] for name in NATIVE.tensor_names)
    if group_size == -1 and len(scales) == 1 and len(qweight.shape) == 4:
        group_size = TILE_K * qweight.shape[1]
    n, k = scales.shape[1], len(scales) * group_size
    if group_size <= 0:
        raise ValueError("the config does not say the group size: quantization_config is missing")
    if scales.shape != zeros.shape or qweight.shape != tiled_shape(n, k) or k <= 0:
        raise ValueError(f"{describe_shapes(tensors)} in groups of {group_size} are not one weight")
    check_int4_shape(k, group_size)
    return Int4(qweight, scales, zeros, group_size)


def write_native(w: Int4) -> dict[str, Tensor]:
    """The tensors of a weight in the native layout."""
    return {"qweight": w.qweight, "scales": w.scales, "zeros": w.zeros}


def read_awq_gemm(tensors: LinearTensors, group_size: int = 0) -> Int4:
    """Read a linear in AutoAWQ's "gemm" layout. Errors: ValueError."""
    qweight, scales, qzeros = (tensors[name] for name in AWQ_GEMM.tensor_names)
    k, n, G = qweight.shape[0], 8 * qweight.shape[1], len(scales)
    if scales.shape != (G, n) or qzeros.shape != (G, n // 8) or G == 0 or k % G:
        raise not_one_weight(tensors)
    check_int4_shape(k, k // G)
    codes = repack(n, k, lambda rows: unpack_awq_gemm(qweight[:, rows.start // 8 : rows.stop // 8]), pack_tiles)
    return Int4(codes, scales, unpack_awq_gemm(qzeros).T.to(scales.dtype).contiguous(), k // G)


def write_awq_gemm(w: Int4) -> dict[str, Tensor]:
    """The tensors of a weight in AutoAWQ's "gemm" layout. Errors: ValueError if it cannot hold them."""
    n, k = w.shape
    if n % 8:
        raise ValueError(f"{n} outputs: AutoAWQ's layout holds a multiple of 8")
    qweight = repack(n, k, partial(row_codes, w), pack_awq_gemm, dim=1)
    return {"qweight": qweight, "qzeros": pack_awq_gemm(integer_zeros(w).T), "scales": w.scales}


def infer_group_size(k: int, num_rows: int, tensors: LinearTensors, configured: int) -> int:
    """Infer the group size from k inputs and the number of stored scale rows; it is k if -1 is configured.

    Errors: ValueError if no group size gives that number of rows.
    """
    if configured == -1 and num_rows == CODES_PER_WORD * {32: 4, 64: 2}.get(k, 1):
        return k
    shapes = describe_shapes(tensors)
    if configured == -1:
        raise ValueError(f"{shapes}: {num_rows} scales for {k} inputs are not those of one group a row")
    for group_size in LLM_AWQ_GROUP_SIZES:
        if k % group_size == 0 and padded_scale_rows(k, group_size) == num_rows:
            return group_size
    raise ValueError(f"{shapes}: {num_rows} scales for {k} inputs fit none of the groups {LLM_AWQ_GROUP_SIZES}")


def pad_rows(x: Tensor, num_rows: int) -> Tensor:
    """Pad x [G, n] with rows of zeros to [num_rows, n]."""
    return torch.nn.functional.pad(x, (0, 0, 0, num_rows - len(x)))


def require_zero_padding(label: str, x: Tensor, G: int, tensors: LinearTensors) -> None:
    """Check that the padding rows of scales or zeros, those from G on, are 0; if not, the group size was inferred
    wrongly.

    Skipped on the meta device. Errors: ValueError naming the shapes.
    """
    if not x.is_meta and x[G:].any():
        raise ValueError(f"{describe_shapes(tensors)}: {label} beyond the {G} that the inputs have are not zero")


def require_nonzero_scales(scales: Tensor, group_size: int) -> None:
    """Check that no row of scales is 0. If some are, groups are larger than inferred, and the remaining rows are
    padding.

    Skipped on the meta device. Errors: ValueError.
    """
    if not scales.is_meta and (empty := int((scales == 0).all(1).sum())):
        raise ValueError(
            f"{empty} of its {len(scales)} rows of scales are zero: its groups are not of {group_size}; the config's "
            "quantization_config must say their group_size (-1: all inputs)"
        )


def read_awq_v1(tensors: LinearTensors, group_size: int = 0) -> Int4:
    """Read a linear in the layout of llm-awq v1 and AutoAWQ's "gemv". Errors: ValueError."""
    qweight, scales, qzeros = (tensors[name] for name in AWQ_V1.tensor_names)
    n, k = qweight.shape[0], 8 * qweight.shape[1]
    if not scales.shape[0] == qzeros.shape[0] == n:
        raise not_one_weight(tensors)
    group_size = infer_group_size(k, scales.shape[1], tensors, group_size)
    if 8 * qzeros.shape[1] != scales.shape[1]:
        raise not_one_weight(tensors)
    require_zero_padding("scales", scales.T, k // group_size, tensors)
    padded_zeros = unpack_awq_gemv(qzeros).T
    require_zero_padding("zeros", padded_zeros, k // group_size, tensors)
    scales = scales[:, : k // group_size].T.contiguous()
    require_nonzero_scales(scales, group_size)
    zeros = padded_zeros[: k // group_size].to(scales.dtype).contiguous()
    return Int4(repack(n, k, lambda rows: unpack_awq_gemv(qweight[rows]), pack_tiles), scales, zeros, group_size)


def write_awq_v1(w: Int4) -> dict[str, Tensor]:
    """The tensors of a weight in the layout of llm-awq v1. Errors: ValueError if it cannot hold them."""
    n, k = w.shape
    num_rows = num_scale_rows(w)
    zeros = pad_rows(integer_zeros(w), num_rows)
    scales = pad_rows(w.scales, num_rows).T.contiguous()
    return {
        "qweight": repack(n, k, partial(row_codes, w), pack_awq_gemv),
        "qzeros": pack_awq_gemv(zeros.T),
        "scales": scales,
    }


def num_scale_rows(w: Int4) -> int:
    """The number of scales that llm-awq stores for each output of w. Errors: ValueError for other group sizes."""
    if w.group_size not in LLM_AWQ_GROUP_SIZES:
        supported = ", ".join(map(str, LLM_AWQ_GROUP_SIZES[::-1]))
        raise ValueError(f"groups of {w.group_size}: llm-awq's layouts hold groups of {supported}")
    return padded_scale_rows(w.shape[1], w.group_size)


def read_awq_v2(tensors: LinearTensors, group_size: int = 0) -> Int4:
    """Read a linear in the layout of llm-awq v2 and AutoAWQ's "gemv_fast". Errors: ValueError."""
    name = "scaled_zeros" if "scaled_zeros" in tensors else "qzeros"
    qweight, scales, scaled = tensors["qweight"], tensors["scales"], tensors[name]
    n, k = 4 * qweight.shape[0], qweight.shape[1]
    if scales.shape != scaled.shape or scales.shape[1] != n:
        raise not_one_weight(tensors)
    if k % 64:
        raise ValueError(f"{describe_shapes(tensors)}: {k} inputs are not a multiple of 64")
    group_size = infer_group_size(k, len(scales), tensors, group_size)
    require_zero_padding("scales", scales, k // group_size, tensors)
    scales, scaled = scales[: k // group_size], scaled[: k // group_size]
    require_nonzero_scales(scales, group_size)
    # A scale of 0 makes all of its group 0, whatever the zero is.
    zeros = torch.where(scales == 0, 0, -scaled.double() / scales.double()).round()
    if not scales.is_meta:
        mismatched = (scale_zeros(scales, zeros) != scaled) | ~((zeros >= 0) & (zeros <= 15))
        if count := int(mismatched.sum()):
            raise ValueError(f"{count} of its scaled zeros are not -scale times a whole number from 0 to 15")
    codes = repack(n, k, lambda rows: unpack_awq_v2(qweight[rows.start // 4 : rows.stop // 4]), pack_tiles)
    return Int4(codes, scales.contiguous(), zeros.to(scales.dtype), group_size, "fma")


def scale_zeros(scales: Tensor, zeros: Tensor) -> Tensor:
    """Compute -(scale * zero), rounded once, as llm-awq stores it."""
    return -(scales.double() * zeros.double()).to(scales.dtype)


def write_awq_v2(w: Int4) -> dict[str, Tensor]:
    """The tensors of a weight in the layout of llm-awq v2. Errors: ValueError if it cannot hold them."""
    n, k = w.shape
    if n % 4 or k % 64:
        raise ValueError(f"[{n}, {k}]: llm-awq v2 holds multiples of 4 outputs and 64 inputs")
    num_rows, zeros = num_scale_rows(w), integer_zeros(w)
    scaled = scale_zeros(w.scales, zeros)
    if not w.scales.is_meta:
        lossy = (w.scales == 0) & (zeros != 0) | ~torch.isfinite(scaled)
        if lossy.any():
            raise ValueError("a scale is 0, or so large that scale times zero is not finite: llm-awq v2 loses that")
    qweight = repack(n, k, partial(row_codes, w), pack_awq_v2)
    return {"qweight": qweight, "scales": pad_rows(w.scales, num_rows), "scaled_zeros": pad_rows(scaled, num_rows)}


NATIVE = Layout("vila-triton", ("qweight", "scales", "zeros"), "sub", read_native, write_native)
AWQ_GEMM = Layout("awq-gemm", ("qweight", "scales", "qzeros"), "sub", read_awq_gemm, write_awq_gemm)
AWQ_V1 = Layout("awq-v1", ("qweight", "scales", "qzeros"), "sub", read_awq_v1, write_awq_v1)
AWQ_V2 = Layout("awq-v2", ("qweight", "scales", "scaled_zeros"), "fma", read_awq_v2, write_awq_v2)
LAYOUTS = {layout.name: layout for layout in (NATIVE, AWQ_GEMM, AWQ_V1, AWQ_V2)}


def detect_layout(tensors: LinearTensors) -> Layout:
    """Detect the layout of a linear from the names, dtypes and shapes of its tensors. Errors: ValueError."""
    signature = {name: (len(x.shape), x.dtype.is_floating_point) for name, x in tensors.items()}
    int_matrix, float_matrix = (2, False), (2, True)
    if signature == {"qweight": (4, False), "scales": float_matrix, "zeros": float_matrix}:
        return NATIVE
    for name in ("scaled_zeros", "qzeros"):
        if (
            signature == {"qweight": int_matrix, "scales": float_matrix, name: float_matrix}
            and tensors["qweight"].dtype == torch.int16
        ):
            return AWQ_V2
    if signature == {"qweight": int_matrix, "scales": float_matrix, "qzeros": int_matrix}:
        if tensors["qweight"].shape[0] == tensors["scales"].shape[0]:  # n
            return AWQ_V1
        if tensors["qweight"].shape[1] == tensors["qzeros"].shape[1]:  # n/8
            return AWQ_GEMM
    raise ValueError(f"{describe_shapes(tensors)} are of no layout that is known ({', '.join(LAYOUTS)})")


def read_linear(tensors: LinearTensors, group_size: int = 0) -> Int4:
    """Read an int4 linear of whichever layout, told by the last parts of the names of its tensors and their shapes.

    group_size: as `Layout` takes it; the native layout needs it. Errors: ValueError for tensors of no layout, or of
    several weights.
    """
    return detect_layout(tensors).read(tensors, group_size)
