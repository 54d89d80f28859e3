"""Chunks of a ragged batch in kernels: which rows a program takes, and the tile in which old and new keys meet.

A row is a pair (query, query head) of one key/value head; there are RATIO heads, and those of a query lie side by side.
It registers nothing.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl


def max_tiles(tokens: int, sequences: int, queries_per_kv: int, block_m: int) -> int:
    """Tiles of `rows` rows for any batch of so many tokens in so many sequences: some may stay empty."""
    return tokens * queries_per_kv // block_m + sequences


@triton.jit
def find_sequence(tile, start_ptr, b, RATIO: tl.constexpr, BLOCK_M: tl.constexpr):
    """(i, row): the sequence that owns one of `tiles_of` tiles, and the first of its rows that the tile holds.

    The tiles of sequence i begin at start[i] · RATIO // BLOCK_M + i, which leaves each enough of them.
    """
    low, high = tl.full([], 0, tl.int32), b - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(start_ptr + middle).to(tl.int64) * RATIO // BLOCK_M + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle - 1)
    begins = tl.load(start_ptr + low).to(tl.int64) * RATIO // BLOCK_M + low
    return low.to(tl.int64), ((tile - begins) * BLOCK_M).to(tl.int32)


@triton.jit
def query_and_head(row, group, length, RATIO: tl.constexpr, BLOCK_M: tl.constexpr):
    """(query, head, mine) [BLOCK_M] of the rows from `row` on; queries are counted within the chunk."""
    rows = row + tl.arange(0, BLOCK_M)
    query = rows // RATIO
    return query, group * RATIO + rows % RATIO, query < length


@triton.jit
def apply_token_scales(head, scales):
    """Heads [n, d] times the scales [n] that `read_pool` says; the heads themselves if it says none."""
    if len(scales) == 0:
        return head
    else:
        return [(x.to(tl.float32) * scales[0][:, None]).to(x.dtype) for x in head]


@triton.jit
def select_heads(first, a, b):
    """Heads a where `first` [n], else heads b."""
    mask = first[:, None]
    if len(a) > 1:
        return (tl.where(mask, a[0], b[0]), tl.where(mask, a[1], b[1]))
    else:
        return (tl.where(mask, a[0], b[0]),)
