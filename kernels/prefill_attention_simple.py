"""softmax(q kᵀ · scale) v of a chunk of new tokens, causal: the cached keys and the chunk's own in one loop.

One program takes BLOCK_M rows of one KV head of one sequence; a row is a pair (query, query head of the KV head), so
all heads that share keys share their loads. It walks the tokens of the sequence BLOCK_N at a time from the first one
on, with an online softmax in base 2. A token of the context is loaded from its page, a later one from k and v; each
load masks off what the other brings, so a tile may hold both. Since tiles do not depend on where the chunk begins, nor
on the batch or the pages, neither does a bit of the result: this serves "fast" and "batch_invariant".

q [s, h, d], k and v [s, g, d], plain pages [p, l, g, d], any strides; head h of the h/g that share KV head g is row
r % (h/g) of its rows. Programs past the end of their sequence return at once, so the grid needs no lengths. Strides are
compile-time constants, so that the compiler can prove alignment and load heads of 72 in 16-byte pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import PagedKV, QuantizedKVPages, RaggedBatch, prefill_attention
from vila_triton.registry import Unsupported

from ._heads import dot_layout, load_heads, store_heads
from ._kv_pages import load_page_ids, load_paged_heads, page_tensors_and_strides
from ._launch import LOG2_E, check_supported, rows_for_dtype, stages_for_dtype
from ._online_softmax import add_values, dot_qk, init_softmax, log_sum_exp, normalize, softmax_weights
from ._varlen import find_sequence, max_tiles, query_and_head, select_heads

CONFIGS = [{"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}]


@triton.jit(do_not_specialize=["num_seqs", "stride_tb"])  # stride_tb changes with the longest sequence
def _prefill_attention_simple_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_pages,
    v_pages,
    block_table_ptr,
    query_start_loc_ptr,
    context_lens_ptr,
    out_ptr,
    lse_ptr,  # [s, h] or None
    scale,
    num_seqs,
    stride_tb,
    stride_tp,
    stride_q: tl.constexpr,  # of s, h and d
    stride_k: tl.constexpr,  # of s, g and d
    stride_v: tl.constexpr,
    stride_kp: tl.constexpr,  # of p, l, g and d
    stride_vp: tl.constexpr,
    stride_o: tl.constexpr,
    G: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    tiles = tl.num_programs(0) // G
    sequence, row = find_sequence(tl.program_id(0) % tiles, query_start_loc_ptr, num_seqs, QUERIES_PER_KV, BLOCK_M)
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.load(query_start_loc_ptr + sequence).to(tl.int64)
    num_queries = tl.load(query_start_loc_ptr + sequence + 1) - start
    context_len = tl.load(context_lens_ptr + sequence)
    if row >= num_queries * QUERIES_PER_KV:
        return

    query, head, row_mask = query_and_head(row, kv_head, num_queries, QUERIES_PER_KV, BLOCK_M)
    q = load_heads(q_ptr, (start + query) * stride_q[0] + head * stride_q[1], row_mask, stride_q[2], HEAD)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    m_i, l_i, acc = init_softmax(BLOCK_M, HEAD)

    block_table_ptr += sequence * stride_tb
    end = context_len + tl.minimum(tl.max(query) + 1, num_queries)  # keys that the last query of the block sees
    for n in range(0, end, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        cached = tokens < context_len
        new = (tokens >= context_len) & (tokens < end)
        pages = load_page_ids(block_table_ptr, stride_tp, n, context_len, PAGE_SIZE, BLOCK_N)
        k, _ = load_paged_heads(k_pages, stride_kp, pages, tokens, kv_head, cached, dtype, HEAD, PAGE_SIZE)
        v, _ = load_paged_heads(v_pages, stride_vp, pages, tokens, kv_head, cached, dtype, HEAD, PAGE_SIZE)
        rows = start + tokens - context_len  # of k and v
        k_new = load_heads(k_ptr, rows * stride_k[0] + kv_head * stride_k[1], new, stride_k[2], HEAD)
        v_new = load_heads(v_ptr, rows * stride_v[0] + kv_head * stride_v[1], new, stride_v[2], HEAD)
        k, v = select_heads(cached, k, k_new), select_heads(cached, v, v_new)
        scores = dot_qk(q, k) * scale  # [BLOCK_M, BLOCK_N]
        scores = tl.where(tokens[None, :] <= (context_len + query)[:, None], scores, float("-inf"))
        weights, rescale, m_i, l_i = softmax_weights(scores, 1.0, m_i, l_i)
        acc = add_values(weights.to(dtype), v, acc, rescale)

    offsets = (start + query) * stride_o[0] + head * stride_o[1]
    store_heads(out_ptr, offsets, row_mask, stride_o[2], normalize(acc, l_i), HEAD)
    if lse_ptr is not None:
        tl.store(lse_ptr + (start + query) * (G * QUERIES_PER_KV) + head, log_sum_exp(m_i, l_i), mask=row_mask)


@prefill_attention.impl("simple", configs=CONFIGS, batch_invariant=True)
def prefill_attention_simple(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedKV,
    batch: RaggedBatch,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention [s, h, d] in q's dtype, and with `return_lse` its log-sum-exp [s, h] in float32.

    Raises Unsupported for quantized pages and for dtypes and devices that the kernel does not serve.
    """
    if isinstance(cache.k_pages, QuantizedKVPages) or isinstance(cache.v_pages, QuantizedKVPages):
        raise Unsupported("prefill_attention: the simple kernel reads plain pages only")
    check_supported("prefill_attention", q, k, v, cache.k_pages, cache.v_pages)
    (s, h, d), g, b = q.shape, k.shape[1], batch.num_seqs
    out = torch.empty(s, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(s, h, dtype=torch.float32, device=q.device) if return_lse else None
    if d > 128:  # what the registers and the shared memory of all GPUs hold
        BLOCK_M, num_stages = min(BLOCK_M, 32), 1
    BLOCK_M, num_stages = rows_for_dtype(BLOCK_M, q), stages_for_dtype(num_stages, q)
    (k_pages, stride_kp), (v_pages, stride_vp) = map(page_tensors_and_strides, (cache.k_pages, cache.v_pages))
    if out.numel():
        _prefill_attention_simple_kernel[(max_tiles(s, b, h // g, BLOCK_M) * g,)](
            q,
            k,
            v,
            k_pages,
            v_pages,
            cache.block_table,
            batch.query_start_loc.contiguous(),
            batch.context_lens.contiguous(),
            out,
            lse,
            softmax_scale * LOG2_E,
            b,
            *cache.block_table.stride(),
            q.stride(),
            k.stride(),
            v.stride(),
            stride_kp,
            stride_vp,
            out.stride(),
            G=g,
            QUERIES_PER_KV=h // g,
            PAGE_SIZE=cache.page_size,
            HEAD=dot_layout(d, single_block=True),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out if lse is None else (out, lse)
