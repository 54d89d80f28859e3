"""Ragged batches in kernels: which rows of which sequence a program takes.

A row is a pair (query, query head) of one KV head, which QUERIES_PER_KV query heads share; the heads of a query lie
side by side.
"""

import triton
import triton.language as tl


def max_tiles(tokens: int, sequences: int, queries_per_kv: int, block_m: int) -> int:
    """Tiles of `block_m` rows for any batch of so many tokens in so many sequences: some may stay empty."""
    return tokens * queries_per_kv // block_m + sequences


@triton.jit
def find_sequence(tile, query_start_loc_ptr, num_seqs, QUERIES_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr):
    """(i, row): the sequence that owns one of `max_tiles` tiles, and the first of its rows that the tile holds.

    The tiles of sequence i begin at query_start_loc[i] · QUERIES_PER_KV // BLOCK_M + i, which leaves each enough.
    The rows of one sequence are counted in 32 bits, those of all in 64.
    """
    low, high = tl.full([], 0, tl.int32), num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        first_tile = tl.load(query_start_loc_ptr + middle).to(tl.int64) * QUERIES_PER_KV // BLOCK_M + middle
        low = tl.where(first_tile <= tile, middle, low)
        high = tl.where(first_tile <= tile, high, middle - 1)
    first_tile = tl.load(query_start_loc_ptr + low).to(tl.int64) * QUERIES_PER_KV // BLOCK_M + low
    return low.to(tl.int64), ((tile - first_tile) * BLOCK_M).to(tl.int32)


@triton.jit
def query_and_head(row, kv_head, num_queries, QUERIES_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr):
    """(query, head, mask) [BLOCK_M] of the rows from `row` on; queries are counted within the chunk."""
    rows = row + tl.arange(0, BLOCK_M)
    query = rows // QUERIES_PER_KV
    return query, kv_head * QUERIES_PER_KV + rows % QUERIES_PER_KV, query < num_queries


@triton.jit
def select_heads(mask, a, b):
    """Heads a where `mask` [n] is set, else heads b."""
    mask = mask[:, None]
    if len(a) > 1:
        return (tl.where(mask, a[0], b[0]), tl.where(mask, a[1], b[1]))
    else:
        return (tl.where(mask, a[0], b[0]),)
