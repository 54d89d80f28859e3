"""Host code that the int4 launchers share: the checks of a call and the arguments that all kernels take."""

from typing import Any

import triton
from torch import Tensor

from vila_triton.ops import Int4
from vila_triton.registry import Unsupported

from ._int4_dequant import FMA, SUB, UNSCALED
from ._launch import INTERPRETED, check_supported, stages_for_dtype


def check_int4_call(op_name: str, x: Tensor, *weights: Int4) -> None:
    """Check a call of kernels that read whole tiles: Unsupported for tensors that Triton cannot load, and unless a
    group is 32, whole tiles, or all of k.
    """
    check_supported(op_name, x, *(t for w in weights for t in (w.scales, w.zeros)))
    group_size, k = weights[0].group_size, weights[0].shape[1]
    if group_size != 32 and group_size % 64 and group_size != k:
        raise Unsupported(f"{op_name}: the group is {group_size}, but 32, multiples of 64 and all of k are served")


def contiguous_tensors(w: Int4) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, scales and zeros, contiguous as kernels read them; copied only if they are not."""
    return w.qweight.contiguous(), w.scales.contiguous(), w.zeros.contiguous()


def matmul_args(rows: Tensor, w: Int4, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> tuple[Any, ...]:
    """x_ptr, w, bias_ptr, residual_ptr, out_ptr, M, N, K, stride_xm, stride_xk and the strides of out but the last,
    which is 1. Bias and residual [m, n] are contiguous; copied only if they are not.
    """
    terms = (None if term is None else term.contiguous() for term in (bias, residual))
    return rows, contiguous_tensors(w), *terms, out, len(rows), *w.shape, *rows.stride(), *out.stride()[:-1]


def fit_block_k(requested: int, w: Int4) -> int:
    """The inputs of a step: those requested, or fewer, so that a step lies in one group; a tile in groups of 32, whose
    scales are loaded by the word: a thread could not hold those of more."""
    group_size = w.group_size
    return requested if group_size == w.shape[1] != 32 else max(64, min(requested, group_size & -group_size))


def stages_for_group(stages: int, x: Tensor, w: Int4) -> int:
    """The stages of a pipeline that loads x and w, see `stages_for_dtype`; 1 in groups of 32. There Triton would let
    the products of a step, `wgmma` that read weights from registers, go on while the next step writes these registers.
    """
    return 1 if w.group_size == 32 else stages_for_dtype(stages, x)


def rounding_mode(w: Int4, scale_sums: bool) -> int:
    """UNSCALED if scales shall multiply sums and can: with the rounding "sub", where a step lies in one group."""
    if w.rounding == "fma":
        return FMA.value
    return UNSCALED.value if scale_sums and w.group_size != 32 else SUB.value


def target_flags(block_m: int = 64, num_warps: int = 4) -> dict[str, Any]:
    """ASM: the target has the instructions of `codes_minus_zero`. OPAQUE: its compiler must not see how a tile is put
    together, or it would choose a layout for `tl.dot` that costs shuffles; so it would for products that are no
    `wgmma`, as all of those before sm_90, and later those of blocks of fewer than 16 rows or by fewer than 4 warps.
    """
    if INTERPRETED:
        return {"ASM": False, "OPAQUE": False}
    target: Any = triton.runtime.driver.active.get_current_target()
    is_cuda = target.backend == "cuda"
    return {"ASM": is_cuda, "OPAQUE": is_cuda and (target.arch < 90 or block_m < 16 or num_warps < 4)}
