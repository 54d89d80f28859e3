"""Split-K: how k is divided among programs, where they leave their partial sums, and the sum of those.

Partial sums are float32 and are added up in the order of the splits, so that the result has the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.registry.search_space import cdiv

BLOCK = 512


def split_k(k: int, block_k: int, max_splits: int) -> tuple[int, int]:
    """Inputs per split, in whole blocks, and the number of splits: at most `max_splits`, none of them empty."""
    k_per_split = cdiv(cdiv(k, block_k), max_splits) * block_k
    return k_per_split, cdiv(k, k_per_split)


def partial_sums(out: Tensor, splits: int) -> Tensor:
    """Memory for the results of each split of out [m, n]: [splits, m, n] float32, or `out` itself if there is one."""
    if splits == 1:
        return out[None]
    return torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _reduce_splits_kernel(sums_ptr, bias_ptr, residual_ptr, out_ptr, M, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # int64 if N is
    mask = offs_n < N
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        acc += tl.load(sums_ptr + (tl.cast(split, tl.int64) * M + row) * N + offs_n, mask=mask, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + row * N + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)


def reduce_splits(sums: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """Write the sum of sums [splits, m, n], bias [n] and residual [m, n] to out [m, n]; sums and out are contiguous."""
    splits, m, n = sums.shape
    bias, residual = (None if term is None else term.contiguous() for term in (bias, residual))
    grid = (m * cdiv(n, BLOCK),)
    _reduce_splits_kernel[grid](sums, bias, residual, out, m, n, SPLITS=splits, BLOCK=BLOCK, num_warps=4)
