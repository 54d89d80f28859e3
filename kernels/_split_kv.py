"""Split-KV decoding (Flash-Decoding, Dao et al. 2023): how sequences are split, and merging attention over splits.

A sequence of seq_len keys is split on the device into splits of

    keys = seq_len / num_splits, rounded up to a multiple of min_keys, but not below min_keys nor above max_keys

so a short sequence of a ragged batch is not cut into tiny splits, and no program walks more than max_keys keys, however
long one sequence is. The host does not know the lengths, only the capacity of the block table in keys; from it, it
chooses num_splits by a model of time, and with that the largest number of splits that there can be, for the grid and
the workspace. Programs whose split does not exist return at once; of the others the one that is done last merges what
all have left, and where there is but one, it writes the output.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from vila_triton.registry.search_space import cdiv

from ._heads import load_heads
from ._online_softmax import init_softmax

MIN_SPLIT, MAX_SPLIT = 64, 2048  # keys
INVARIANT_SPLIT = 256  # keys of every split but the last of a sequence
SPLIT_OVERHEAD = 64  # starting a program and storing what it leaves takes as long as so many keys
MERGE_OVERHEAD = 2  # and reading it again, by the one program that merges the splits of a head
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
    """The time of decoding, in keys: waves of programs, times the keys of a split and SPLIT_OVERHEAD; and the merge."""
    keys = min(MAX_SPLIT, max(min_keys, cdiv(cdiv(capacity, num_splits), min_keys) * min_keys))
    splits = max(1, cdiv(capacity, keys))
    waves = cdiv(programs * splits, resident_programs)
    return waves * (keys + SPLIT_OVERHEAD) + MERGE_OVERHEAD * splits


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


@triton.jit
def merge_splits(
    split_states, first, count, mask, QUERIES_PER_KV: tl.constexpr, HEAD: tl.constexpr, AT_A_TIME: tl.constexpr
):
    """Merge `count` splits of the heads that share a KV head, in order: (m_i, l_i, acc) of those whose `mask` is set.

    split_states are acc [n, h/g, d] and m_i and l_i, [n, 2, h/g], of all splits, of which these begin at `first`. The
    loads of AT_A_TIME splits are under way at once; bits do not depend on it.
    """
    rows = tl.arange(0, mask.shape[0])
    m_i, l_i, acc = init_softmax(mask.shape[0], HEAD)
    for begin in range(0, count, AT_A_TIME):
        loaded = ()
        for i in tl.static_range(AT_A_TIME):
            split, split_mask = first + begin + i, mask & (begin + i < count)
            sums_ptrs = split_states[1] + split * 2 * QUERIES_PER_KV + rows
            split_m = tl.load(sums_ptrs, mask=split_mask, other=-1.0e38)
            split_l = tl.load(sums_ptrs + QUERIES_PER_KV, mask=split_mask, other=0.0)
            offsets = (split * QUERIES_PER_KV + rows) * HEAD.D  # int64
            loaded += ((split_m, split_l, load_heads(split_states[0], offsets, split_mask, 1, HEAD)),)
        for i in tl.static_range(AT_A_TIME):
            m_new = tl.maximum(m_i, loaded[i][0])
            rescale, weight = tl.exp2(m_i - m_new), tl.exp2(loaded[i][0] - m_new)
            l_i = l_i * rescale + loaded[i][1] * weight
            acc = (acc[0] * rescale[:, None] + loaded[i][2][0] * weight[:, None],)
            m_i = m_new
    return m_i, l_i, acc
