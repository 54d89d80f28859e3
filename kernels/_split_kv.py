"""Cutting the keys of a sequence into splits, and merging attention over them. It registers nothing.

A sequence of `length` keys is cut on the device into splits of

    keys = length / wanted, rounded up to a multiple of `least`, but not below `least` nor above `most`

so a short sequence of a ragged batch is not cut into crumbs, and no program walks more than `most` keys, however long
one sequence is. The host knows no lengths, only how many keys the block table has room for; from these it chooses
`wanted` by a model of time, and with that the largest number of splits that may come, for grid and workspace. Programs
whose split does not exist return at once.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from vila_triton.registry.search_space import cdiv

MIN_SPLIT, MAX_SPLIT = 64, 2048  # keys
INVARIANT_SPLIT = 256  # keys of every split but the last of a sequence
SPLIT_OVERHEAD = 64  # starting a program and merging what it leaves takes as long as so many keys
DEFAULT_NUM_SMS = 132  # where there is no GPU to ask


@dataclass(frozen=True)
class SplitPlan:
    """How sequences are cut; `splits`: the most there can be of one sequence."""

    num_splits: int
    min_keys: int
    max_keys: int
    max_splits: int


def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else DEFAULT_NUM_SMS


def estimated_time(programs: int, capacity: int, num_splits: int, min_keys: int, resident_programs: int) -> int:
    """Rounds times what each takes: the keys of a split and START. A round is what fits on the places at once."""
    keys = max(min_keys, min(MAX_SPLIT, cdiv(capacity, num_splits)))
    return cdiv(programs * max(1, cdiv(capacity, keys)), resident_programs) * (keys + SPLIT_OVERHEAD)


@lru_cache(maxsize=4096)
def plan_splits(numerics: str, programs: int, capacity: int, min_keys: int, resident_programs: int) -> SplitPlan:
    """For `programs` pairs of a sequence and a key head with room for so many keys each, on `places` at a time.

    Under `fast` the number of splits is the one that takes least `time`, the smaller of equals. What twice the programs
    or twice the room may be cut into is no less, so that neither takes more than twice the time: there is no cliff.
    Under `invariant` nothing but the length of a sequence counts.
    """
    if numerics == "invariant":
        return SplitPlan(1, INVARIANT_SPLIT, INVARIANT_SPLIT, max(1, cdiv(capacity, INVARIANT_SPLIT)))
    min_keys = max(MIN_SPLIT, min_keys)
    max_splits = max(1, min(cdiv(capacity, min_keys), resident_programs))
    num_splits = min(
        range(1, max_splits + 1), key=lambda n: estimated_time(programs, capacity, n, min_keys, resident_programs)
    )
    return SplitPlan(num_splits, min_keys, MAX_SPLIT, max(num_splits, cdiv(capacity, MAX_SPLIT)))


@triton.jit
def keys_per_split(length, wanted, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The keys of each split of a sequence; the last one may have fewer."""
    keys = tl.cdiv(tl.cdiv(length, wanted), LEAST) * LEAST
    return tl.minimum(tl.maximum(keys, LEAST), MOST)


@triton.jit
def lse_or_minus_inf(peak, total):
    """log(sum(exp)) from the peak and the sum of the powers of 2 below it; -inf for no key."""
    ln_2 = 0.6931471805599453
    return tl.where(total > 0.0, (peak + tl.log2(tl.where(total > 0.0, total, 1.0))) * ln_2, float("-inf"))


@triton.jit(do_not_specialize=["wanted", "splits"])
def merge_splits_kernel(
    acc_ptr,
    peak_ptr,
    total_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    wanted,
    splits,
    stride_o: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of one sequence: the splits BLOCK_S at a time, in order.

    acc [b, h, splits, d], peak and total [b, h, splits] float32; out [b, h, d]; lse [b, h] or None.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    length = tl.load(length_ptr + sequence)
    count = tl.cdiv(length, keys_per_split(length, wanted, LEAST, MOST))
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    peak = tl.full([1], -1.0e38, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, count, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        there = split < count
        at = program * splits + split  # [BLOCK_S] int64
        peaks = tl.load(peak_ptr + at, mask=there, other=-1.0e38)
        totals = tl.load(total_ptr + at, mask=there, other=0.0)
        parts = tl.load(
            acc_ptr + at[:, None] * D + offs_d[None, :], mask=there[:, None] & mask_d[None, :], other=0.0
        )  # [BLOCK_S, BLOCK_D]
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shares = tl.exp2(peaks - new_peak)  # [BLOCK_S]
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(shares * totals, 0)
        acc = acc * rescale + tl.sum(shares[:, None] * parts, 0)
        peak = new_peak
    out = acc / tl.where(total == 0.0, 1.0, total)
    out_ptr += sequence * stride_o[0] + head * stride_o[1] + offs_d * stride_o[2]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    if lse_ptr is not None:
        tl.store(lse_ptr + program + tl.arange(0, 1), lse_or_minus_inf(peak, total))
