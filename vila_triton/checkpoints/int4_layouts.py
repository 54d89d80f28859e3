"""The layouts that int4 linears have in checkpoints, each as a pair of pure functions to and from `Int4`.

    ours      qweight [n/16, k/64, 32, 4] int32   scales [G, n]    zeros [G, n]             `Int4` as it is
    awq-gemm  qweight [k, n/8] int32              scales [G, n]    qzeros [G, n/8] int32    AutoAWQ, version "gemm"
    awq-v1    qweight [n, k/8] int32              scales [n, 8W]   qzeros [n, W] int32      llm-awq v1, AutoAWQ "gemv"
    awq-v2    qweight [n/4, k] int16              scales [8W, n]   scaled_zeros [8W, n]     llm-awq v2 (AutoAWQ
              "gemv_fast" calls the last `qzeros`)

G = k / group; 8W are the rows that llm-awq makes of G, filled up with zeros. A scaled zero is -(scale · zero), rounded;
the zero is a whole number and comes back exactly, or the checkpoint is refused. Tensors may be on torch's meta device:
then shapes and dtypes are worked out and nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..ops import Int4
from ..ops.int4 import check_int4
from .int4_packing import (
    NIBBLES,
    TILE_K,
    TILE_N,
    pack_gemm,
    pack_rows,
    pack_tiles,
    pack_v2,
    tiles,
    unpack_gemm,
    unpack_rows,
    unpack_tiles,
    unpack_v2,
    v2_rows,
)

Leaves = Mapping[str, Tensor]
AT_ONCE = 1 << 20  # codes unpacked at a time, so that little memory is held beside the weight
V2_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Layout:
    """`read` makes an `Int4` of a linear's leaves, `write` leaves of an `Int4`; both raise ValueError with the reason.

    `read` takes the group size that the config says too, which ours alone cannot tell from shapes: -1 for one group a
    row, 0 if nothing is said.
    `order` is where the kernels of the format round, unless the checkpoint says otherwise (`Int4.order`).
    """

    name: str
    leaves: tuple[str, ...]
    order: Literal["sub", "fma"]
    read: Callable[[Leaves, int], Int4]
    write: Callable[[Int4], dict[str, Tensor]]


def repack(n: int, k: int, unpack: Callable[[slice], Tensor], pack: Callable[[Tensor], Tensor], dim: int = 0) -> Tensor:
    """Pack codes [n, k] again, a block of outputs at a time; `dim` is that of the outputs in the result."""
    step = max(TILE_N, AT_ONCE // k // TILE_N * TILE_N)
    return torch.cat([pack(unpack(slice(i, min(i + step, n)))) for i in range(0, n, step)], dim)


def codes_of(w: Int4, rows: slice) -> Tensor:
    """Codes of some outputs, which begin at a tile: [rows, k]."""
    held = w.qweight[rows.start // TILE_N : -(-rows.stop // TILE_N)]
    return unpack_tiles(held, rows.stop - rows.start, w.shape[1])


def whole_zeros(w: Int4) -> Tensor:
    """The zeros as int32 [G, n]. Errors: ValueError if one is no code."""
    zeros = w.zeros.to(torch.int32)
    if not w.zeros.is_meta and not ((zeros == w.zeros) & (zeros >= 0) & (zeros < 16)).all():
        raise ValueError("its zeros are not all whole numbers from 0 to 15, which is all that this layout holds")
    return zeros


def require(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)


def shapes(leaves: Leaves) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in leaves.items())


def read_ours(leaves: Leaves, group: int) -> Int4:
    qweight, scales, zeros = (leaves[name] for name in OURS.leaves)
    if group == -1 and len(scales) == 1 and len(qweight.shape) == 4:
        group = TILE_K * qweight.shape[1]
    n, k = scales.shape[1], len(scales) * group
    require(group > 0, "the config does not say the group size: quantization_config is missing")
    fits = scales.shape == zeros.shape and qweight.shape == tiles(n, k) and k > 0
    require(fits, f"{shapes(leaves)} in groups of {group} are not one weight")
    check_int4(k, group)
    return Int4(qweight, scales, zeros, group)


def write_ours(w: Int4) -> dict[str, Tensor]:
    return {"qweight": w.qweight, "scales": w.scales, "zeros": w.zeros}


def read_gemm(leaves: Leaves, group: int = 0) -> Int4:
    qweight, scales, qzeros = (leaves[name] for name in GEMM.leaves)
    k, n, G = qweight.shape[0], 8 * qweight.shape[1], len(scales)
    fits = scales.shape == (G, n) and qzeros.shape == (G, n // 8) and G > 0 and k % G == 0
    require(fits, f"{shapes(leaves)} are not one weight")
    check_int4(k, k // G)
    codes = repack(n, k, lambda rows: unpack_gemm(qweight[:, rows.start // 8 : rows.stop // 8]), pack_tiles)
    return Int4(codes, scales, unpack_gemm(qzeros).T.to(scales.dtype).contiguous(), k // G)


def write_gemm(w: Int4) -> dict[str, Tensor]:
    n, k = w.shape
    require(n % 8 == 0, f"{n} outputs: AutoAWQ's layout holds a multiple of 8")
    qweight = repack(n, k, partial(codes_of, w), pack_gemm, dim=1)
    return {"qweight": qweight, "qzeros": pack_gemm(whole_zeros(w).T), "scales": w.scales}


def group_of(k: int, rows: int, leaves: Leaves, said: int) -> int:
    """The group size that k inputs and `rows` stored scales tell; k if it is said to be -1."""
    if said == -1 and rows == NIBBLES * {32: 4, 64: 2}.get(k, 1):
        return k
    if said == -1:
        raise ValueError(f"{shapes(leaves)}: {rows} scales for {k} inputs are not those of one group a row")
    for group in V2_GROUPS:
        if k % group == 0 and v2_rows(k, group) == rows:
            return group
    raise ValueError(f"{shapes(leaves)}: {rows} scales for {k} inputs fit none of the groups {V2_GROUPS}")


def padded(x: Tensor, rows: int) -> Tensor:
    """[G, n] -> [rows, n], zeros below."""
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))


def require_padding(what: str, x: Tensor, G: int, leaves: Leaves) -> None:
    """What lies beyond the real groups is zero; if not, the group size was not what it seems."""
    if not x.is_meta and x[G:].any():
        raise ValueError(f"{shapes(leaves)}: {what} beyond the {G} that the inputs have are not zero")


def require_scales(scales: Tensor, group: int) -> None:
    """Of groups larger than they seem, as many are stored and the rows of the others are zero."""
    if not scales.is_meta and (empty := int((scales == 0).all(1).sum())):
        raise ValueError(
            f"{empty} of its {len(scales)} rows of scales are zero: its groups are not of {group}; the config's "
            "quantization_config must say their group_size (-1: all inputs)"
        )


def read_v1(leaves: Leaves, group: int = 0) -> Int4:
    qweight, scales, qzeros = (leaves[name] for name in V1.leaves)
    n, k = qweight.shape[0], 8 * qweight.shape[1]
    require(scales.shape[0] == qzeros.shape[0] == n, f"{shapes(leaves)} are not one weight")
    group = group_of(k, scales.shape[1], leaves, group)
    require(8 * qzeros.shape[1] == scales.shape[1], f"{shapes(leaves)} are not one weight")
    require_padding("scales", scales.T, k // group, leaves)
    all_zeros = unpack_rows(qzeros).T
    require_padding("zeros", all_zeros, k // group, leaves)
    scales = scales[:, : k // group].T.contiguous()
    require_scales(scales, group)
    zeros = all_zeros[: k // group].to(scales.dtype).contiguous()
    return Int4(repack(n, k, lambda rows: unpack_rows(qweight[rows]), pack_tiles), scales, zeros, group)


def write_v1(w: Int4) -> dict[str, Tensor]:
    n, k = w.shape
    rows = rows_of(w)
    zeros = padded(whole_zeros(w), rows)
    scales = padded(w.scales, rows).T.contiguous()
    return {
        "qweight": repack(n, k, partial(codes_of, w), pack_rows),
        "qzeros": pack_rows(zeros.T),
        "scales": scales,
    }


def rows_of(w: Int4) -> int:
    """Scales that llm-awq stores for each output."""
    groups = ", ".join(map(str, V2_GROUPS[::-1]))
    require(w.group in V2_GROUPS, f"groups of {w.group}: llm-awq's layouts hold groups of {groups}")
    return v2_rows(w.shape[1], w.group)


def read_v2(leaves: Leaves, group: int = 0) -> Int4:
    name = "scaled_zeros" if "scaled_zeros" in leaves else "qzeros"
    qweight, scales, scaled = leaves["qweight"], leaves["scales"], leaves[name]
    n, k = 4 * qweight.shape[0], qweight.shape[1]
    require(scales.shape == scaled.shape and scales.shape[1] == n, f"{shapes(leaves)} are not one weight")
    require(k % 64 == 0, f"{shapes(leaves)}: {k} inputs are not a multiple of 64")
    group = group_of(k, len(scales), leaves, group)
    require_padding("scales", scales, k // group, leaves)
    scales, scaled = scales[: k // group], scaled[: k // group]
    require_scales(scales, group)
    # A scale of 0 makes all of its group 0, whatever the zero is.
    zeros = torch.where(scales == 0, 0, -scaled.double() / scales.double()).round()
    if not scales.is_meta:
        off = (scaled_zeros(scales, zeros) != scaled) | ~((zeros >= 0) & (zeros <= 15))
        count = int(off.sum())
        require(not count, f"{count} of its scaled zeros are not -scale times a whole number from 0 to 15")
    codes = repack(n, k, lambda rows: unpack_v2(qweight[rows.start // 4 : rows.stop // 4]), pack_tiles)
    return Int4(codes, scales.contiguous(), zeros.to(scales.dtype), group, "fma")


def scaled_zeros(scales: Tensor, zeros: Tensor) -> Tensor:
    """-(scale · zero), rounded once, as llm-awq stores it."""
    return -(scales.double() * zeros.double()).to(scales.dtype)


def write_v2(w: Int4) -> dict[str, Tensor]:
    n, k = w.shape
    require(n % 4 == 0 and k % 64 == 0, f"[{n}, {k}]: llm-awq v2 holds multiples of 4 outputs and 64 inputs")
    rows, zeros = rows_of(w), whole_zeros(w)
    scaled = scaled_zeros(w.scales, zeros)
    if not w.scales.is_meta:
        lost = (w.scales == 0) & (zeros != 0) | ~torch.isfinite(scaled)
        require(not lost.any(), "a scale is 0, or so large that scale times zero is not finite: llm-awq v2 loses that")
    qweight = repack(n, k, partial(codes_of, w), pack_v2)
    return {"qweight": qweight, "scales": padded(w.scales, rows), "scaled_zeros": padded(scaled, rows)}


OURS = Layout("ours", ("qweight", "scales", "zeros"), "sub", read_ours, write_ours)
GEMM = Layout("awq-gemm", ("qweight", "scales", "qzeros"), "sub", read_gemm, write_gemm)
V1 = Layout("awq-v1", ("qweight", "scales", "qzeros"), "sub", read_v1, write_v1)
V2 = Layout("awq-v2", ("qweight", "scales", "scaled_zeros"), "fma", read_v2, write_v2)
LAYOUTS = {layout.name: layout for layout in (OURS, GEMM, V1, V2)}


def layout_of(leaves: Leaves) -> Layout:
    """The layout that the leaves of a linear have, told by their names, dtypes and shapes. Errors: ValueError."""
    kinds = {name: (len(x.shape), x.dtype.is_floating_point) for name, x in leaves.items()}
    flat, table = (2, False), (2, True)
    if kinds == {"qweight": (4, False), "scales": table, "zeros": table}:
        return OURS
    for name in ("scaled_zeros", "qzeros"):
        if kinds == {"qweight": flat, "scales": table, name: table} and leaves["qweight"].dtype == torch.int16:
            return V2
    if kinds == {"qweight": flat, "scales": table, "qzeros": flat}:
        if leaves["qweight"].shape[0] == leaves["scales"].shape[0]:  # n
            return V1
        if leaves["qweight"].shape[1] == leaves["qzeros"].shape[1]:  # n/8
            return GEMM
    raise ValueError(f"{shapes(leaves)} are of no layout that is known ({', '.join(LAYOUTS)})")
