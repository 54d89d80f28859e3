"""Split-KV decoding (Flash-Decoding, Dao et al. 2023): how sequences are split, and merging attention over splits.

A sequence of seq_len keys is split on the device into splits of

    keys = seq_len / num_splits, rounded up to a multiple of min_keys, but not below min_keys nor above max_keys

so a short sequence of a ragged batch is not cut into tiny splits, and no program walks more than max_keys keys, however
long one sequence is. The host does not know the lengths, only the capacity of the block table in keys; from it, it
chooses num_splits by a model of time, and with that the largest number of splits that there can be, for the grid and
the workspace. Programs whose split does not exist return at once.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from vila_triton.registry.search_space import cdiv

from ._online_softmax import log_sum_exp, normalize

MIN_SPLIT, MAX_SPLIT = 64, 2048  # keys
INVARIANT_SPLIT = 256  # keys of every split but the last of a sequence
SPLIT_OVERHEAD = 64  # starting a program and merging what it leaves takes as long as so many keys
DEFAULT_NUM_SMS = 132  # where there is no GPU to ask


@dataclass(frozen=True)
class SplitPlan:
    """The split of the keys of sequences; `max_splits` is the most that one sequence can have."""

    num_splits: int
    min_keys: int
    max_keys: int
    max_splits: int


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else DEFAULT_NUM_SMS


def estimated_time(programs: int, capacity: int, num_splits: int, min_keys: int, resident_programs: int) -> int:
    """The time of decoding, in keys: waves of programs, times the keys of a split and SPLIT_OVERHEAD."""
    keys = max(min_keys, min(MAX_SPLIT, cdiv(capacity, num_splits)))
    return cdiv(programs * max(1, cdiv(capacity, keys)), resident_programs) * (keys + SPLIT_OVERHEAD)


@lru_cache(maxsize=4096)
def plan_splits(numerics: str, programs: int, capacity: int, min_keys: int, resident_programs: int) -> SplitPlan:
    """The split of `programs` pairs of a sequence and a KV head, each with room for `capacity` keys.

    Under "fast" the number of splits is the one of least `estimated_time`, the smaller of equals. Twice the programs or
    twice the capacity never allow fewer splits, so that neither takes more than twice the time: there is no cliff.
    Under "batch_invariant" nothing but the length of a sequence counts.
    """
    if numerics == "batch_invariant":
        return SplitPlan(1, INVARIANT_SPLIT, INVARIANT_SPLIT, max(1, cdiv(capacity, INVARIANT_SPLIT)))
    min_keys = max(MIN_SPLIT, min_keys)
    most = max(1, min(cdiv(capacity, min_keys), resident_programs))
    num_splits = min(
        range(1, most + 1), key=lambda n: estimated_time(programs, capacity, n, min_keys, resident_programs)
    )
    return SplitPlan(num_splits, min_keys, MAX_SPLIT, max(num_splits, cdiv(capacity, MAX_SPLIT)))


@triton.jit
def keys_per_split(seq_len, num_splits, MIN_KEYS: tl.constexpr, MAX_KEYS: tl.constexpr):
    """The keys of each split of a sequence; the last one may have fewer."""
    keys = tl.cdiv(tl.cdiv(seq_len, num_splits), MIN_KEYS) * MIN_KEYS
    return tl.minimum(tl.maximum(keys, MIN_KEYS), MAX_KEYS)


@triton.jit(do_not_specialize=["num_splits", "max_splits"])
def merge_splits_kernel(
    acc_ptr,
    m_ptr,
    l_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    num_splits,
    max_splits,
    stride_o: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    MAX_KEYS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of one sequence: merge its splits BLOCK_S at a time, in order.

    acc [b, h, max_splits, d], m and l [b, h, max_splits] float32; out [b, h, d]; lse [b, h] or None.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    seq_len = tl.load(seq_lens_ptr + sequence)
    count = tl.cdiv(seq_len, keys_per_split(seq_len, num_splits, MIN_KEYS, MAX_KEYS))
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    m_i = tl.full([1], -1.0e38, tl.float32)
    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for first in range(0, count, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        mask = split < count
        offsets = program * max_splits + split  # [BLOCK_S] int64
        split_m = tl.load(m_ptr + offsets, mask=mask, other=-1.0e38)
        split_l = tl.load(l_ptr + offsets, mask=mask, other=0.0)
        split_acc = tl.load(
            acc_ptr + offsets[:, None] * D + offs_d[None, :], mask=mask[:, None] & mask_d[None, :], other=0.0
        )  # [BLOCK_S, BLOCK_D]
        m_new = tl.maximum(m_i, tl.max(split_m, 0))
        weights = tl.exp2(split_m - m_new)  # [BLOCK_S]
        rescale = tl.exp2(m_i - m_new)
        l_i = l_i * rescale + tl.sum(weights * split_l, 0)
        acc = acc * rescale + tl.sum(weights[:, None] * split_acc, 0)[None, :]
        m_i = m_new
    out_ptr += sequence * stride_o[0] + head * stride_o[1] + offs_d.to(tl.int64)[None, :] * stride_o[2]
    tl.store(out_ptr, normalize((acc,), l_i)[0].to(out_ptr.dtype.element_ty), mask=mask_d[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + program + tl.arange(0, 1), log_sum_exp(m_i, l_i))
