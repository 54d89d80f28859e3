"""softmax(q kᵀ · scale) v of a chunk of new tokens, causal: the cached keys and the chunk's own in one loop.

One program takes BLOCK_M rows of one key/value head of one sequence; a row is a pair (query, query head of the group),
so all heads that share keys share their loads. It walks the tokens of the sequence BLOCK_N at a time from the first one
on, with an online softmax in base 2. A token before `history` is loaded from its page, a later one from k and v; each
load masks off what the other brings, so a tile may hold both. Since tiles do not depend on where the chunk begins, nor
on the batch or the pages, neither does a bit of the result: this serves both policies.

q [s, h, d], k and v [s, g, d], plain pages [p, l, g, d], any strides; head h of the h/g that share key/value head g is
row r % (h/g) of its group. Programs past the end of their sequence return at once, so the grid needs no lengths.
Strides are compile-time constants: heads of 72 are whole 16-byte loads only if the compiler sees it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, QuantizedKVPages, prefill_attention
from vila_triton.registry import Unsupported

from ._launch import (
    LOG2_E,
    attend_simple_tile,
    cast_operand,
    check_supported,
    dot_block,
    init_simple_softmax,
    normalize,
    page_offsets,
    rows_for_dtype,
    stages_for_dtype,
)
from ._online_softmax import load_block, log_sum_exp, store_block
from ._varlen import find_sequence, max_tiles, query_and_head

CONFIGS = [{"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}]


@triton.jit(do_not_specialize=["b", "stride_tb"])  # stride_tb changes with the longest sequence
def _prefill_attention_simple_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    table_ptr,
    start_ptr,
    history_ptr,
    out_ptr,
    lse_ptr,  # [s, h] or None
    scale,
    b,
    stride_tb,
    stride_tp,
    stride_q: tl.constexpr,  # of s, h and d
    stride_k: tl.constexpr,  # of s, g and d
    stride_v: tl.constexpr,
    stride_kp: tl.constexpr,  # of p, l, g and d
    stride_vp: tl.constexpr,
    stride_o: tl.constexpr,
    G: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tl.static_assert(BLOCK_D >= D and BLOCK_D >= 16, "one block covers the head")
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    tiles = tl.num_programs(0) // G
    sequence, row = find_sequence(tl.program_id(0) % tiles, start_ptr, b, RATIO, BLOCK_M)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.load(start_ptr + sequence).to(tl.int64)
    length = tl.load(start_ptr + sequence + 1) - first
    history = tl.load(history_ptr + sequence).to(tl.int64)
    if row >= length * RATIO:
        return

    query, head, mine = query_and_head(row.to(tl.int64), group, length, RATIO, BLOCK_M)  # [BLOCK_M]
    at = (first + query) * stride_q[0] + head * stride_q[1]
    q = load_block(q_ptr, at, mine, stride_q[2], 0, BLOCK_D, D)  # [BLOCK_M, BLOCK_D]
    peak, total, acc = init_simple_softmax(BLOCK_M, BLOCK_D)

    table_ptr += sequence * stride_tb
    end = history + tl.minimum(tl.max(query) + 1, length)  # keys that the last query of the block sees
    for n in range(0, end, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        old = tokens < history
        new = (tokens >= history) & (tokens < end)
        of = first + tokens - history  # rows of k and v
        at_k = page_offsets(table_ptr, tokens, old, stride_tp, stride_kp[0], stride_kp[1], PAGE) + group * stride_kp[2]
        at_v = page_offsets(table_ptr, tokens, old, stride_tp, stride_vp[0], stride_vp[1], PAGE) + group * stride_vp[2]
        k_old = load_block(k_pages_ptr, at_k, old, stride_kp[3], 0, BLOCK_D, D)  # [BLOCK_N, BLOCK_D]
        v_old = load_block(v_pages_ptr, at_v, old, stride_vp[3], 0, BLOCK_D, D)
        k_new = load_block(k_ptr, of * stride_k[0] + group * stride_k[1], new, stride_k[2], 0, BLOCK_D, D)
        v_new = load_block(v_ptr, of * stride_v[0] + group * stride_v[1], new, stride_v[2], 0, BLOCK_D, D)
        k = tl.where(old[:, None], cast_operand(k_old, q.dtype), k_new)
        v = tl.where(old[:, None], cast_operand(v_old, q.dtype), v_new)
        visible = tokens[None, :] <= (history + query)[:, None]
        peak, total, acc = attend_simple_tile(q, tl.trans(k), v, visible, scale, peak, total, acc)

    at = (first + query) * stride_o[0] + head * stride_o[1]
    store_block(out_ptr, at, mine, stride_o[2], normalize(acc, total), 0, BLOCK_D, D)
    if lse_ptr is not None:
        tl.store(lse_ptr + (first + query) * (G * RATIO) + head, log_sum_exp(peak, total), mask=mine)


@prefill_attention.impl("simple", configs=CONFIGS, batch_invariant=True)
def prefill_attention_simple(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    block_table: Tensor,
    query_start_loc: Tensor,
    context_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(k_pages, QuantizedKVPages) or isinstance(v_pages, QuantizedKVPages):
        raise Unsupported("prefill_attention: the simple kernel reads plain pages only")
    check_supported("prefill_attention", q, k, v, k_pages, v_pages)
    (s, h, d), g, b = q.shape, k.shape[1], len(context_lens)
    out = torch.empty(s, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(s, h, dtype=torch.float32, device=q.device) if return_lse else None
    if d > 128:  # what the registers and the shared memory of all GPUs hold
        BLOCK_M, num_stages = min(BLOCK_M, 32), 1
    BLOCK_M, num_stages = rows_for_dtype(BLOCK_M, q), stages_for_dtype(num_stages, q)
    if out.numel():
        _prefill_attention_simple_kernel[(max_tiles(s, b, h // g, BLOCK_M) * g,)](
            q,
            k,
            v,
            k_pages,
            v_pages,
            block_table,
            query_start_loc.contiguous(),
            context_lens.contiguous(),
            out,
            lse,
            softmax_scale * LOG2_E,
            b,
            *block_table.stride(),
            q.stride(),
            k.stride(),
            v.stride(),
            k_pages.stride(),
            v_pages.stride(),
            out.stride(),
            G=g,
            RATIO=h // g,
            D=d,
            PAGE=k_pages.shape[1],
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_D=dot_block(d),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out if lse is None else (out, lse)
