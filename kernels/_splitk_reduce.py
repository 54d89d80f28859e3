"""The sum of the parts that programs left, in their order, so that it has the same bits every time. It registers
nothing."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit(do_not_specialize_on_alignment=["M"])
def _reduce_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, M, N, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(PARTS):
        acc += tl.load(parts_ptr + (split * M + row) * N + offs_n, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)


def reduce_splits(partial_sums: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """parts [p, m, n] float32 and bias [n] -> out [m, n], all contiguous."""
    splits, m, n = partial_sums.shape
    _reduce_splits_kernel[(m * triton.cdiv(n, BLOCK),)](
        partial_sums,
        out if bias is None else bias.contiguous(),
        out,
        m,
        n,
        PARTS=splits,
        HAS_BIAS=bias is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
