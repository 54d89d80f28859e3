"""Split-K: how k is divided among programs, and how the one that arrives last adds up their sums and stores the result.

Sums of splits are float32 and are added up in the order of the splits, so that the result has the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.registry.search_space import cdiv

from ._last_arriver import arrival_counters, arrives_last


def split_k(k: int, block_k: int, max_splits: int) -> tuple[int, int]:
    """Inputs per split, in whole blocks, and the number of splits: at most `max_splits`, none of them empty."""
    k_per_split = cdiv(cdiv(k, block_k), max_splits) * block_k
    return k_per_split, cdiv(k, k_per_split)


def partial_sums(out: Tensor, splits: int, blocks: int) -> tuple[Tensor, Tensor] | None:
    """Memory for the sums of each split of out [m, n], [splits, m, n] float32, and a counter for each of its blocks."""
    if splits == 1:
        return None
    sums = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    return sums, arrival_counters(out.device, blocks)


@triton.jit
def store_result(acc, offs_m, offs_n, bias_ptr, residual_ptr, out_ptr, M, N, stride_om):
    """Store acc, plus bias and residual unless they are None, to rows `offs_m` and columns `offs_n` of out; acc has the
    shape of both together."""
    mask = (offs_m < M) & (offs_n < N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs_m * N + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_m * stride_om + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce_and_store(
    acc, offs_m, offs_n, block, split, parts, bias_ptr, residual_ptr, out_ptr, M, N, stride_om, SPLITS: tl.constexpr
):
    """Store acc, the sum of one of SPLITS splits of k for a block of out, or what all of them come to if this program
    arrives last; see `store_result`. `parts`: of `partial_sums`."""
    if SPLITS == 1:
        store_result(acc, offs_m, offs_n, bias_ptr, residual_ptr, out_ptr, M, N, stride_om)
    else:
        sums_ptr, counters_ptr = parts
        size = tl.cast(M, tl.int64) * N
        store_result(acc, offs_m, offs_n, None, None, sums_ptr + split * size, M, N, N)
        if arrives_last(counters_ptr + block, SPLITS):
            mask = (offs_m < M) & (offs_n < N)
            total = tl.zeros_like(acc)
            for other in tl.static_range(SPLITS):  # unrolled, so that all are loaded at once
                total += tl.load(sums_ptr + other * size + offs_m * N + offs_n, mask=mask, other=0.0)
            store_result(total, offs_m, offs_n, bias_ptr, residual_ptr, out_ptr, M, N, stride_om)
