"""softmax(q kᵀ · scale) v of a chunk of new tokens, causal, over the cached pages and then over the chunk itself.

One program takes BLOCK_M rows of one KV head of one sequence; a row is a pair (query, query head of the KV head), so
all heads that share keys share their loads. The grid depends on the number of tokens and sequences alone: a program
finds its sequence by bisection, and those that see the most keys start first. It walks the keys in tiles of BLOCK_N,
which begin at multiples of BLOCK_N counted from the first token of the sequence: whole tiles of the context in its
pages; the tile in which the context ends and the chunk begins; tiles of the chunk that all its rows see; and the
diagonal. Only the second and the last kind need masks. The chunk's own keys are never read from pages.

So a sum runs over the same tiles in the same order wherever a chunk begins and however the pages lie. Under the
numerics "batch_invariant" the tile does not depend on the config either: it is that of CONFIGS[0].

q [s, h, d], k and v [s, g, d], pages [p, l, g, d], any strides, plain or quantized; head h of the h/g that share KV
head g is row r % (h/g) of its rows. Strides are compile-time constants: a model has few, and unknown ones cost the
registers that the tiles need.

Source: Dao et al., FlashAttention (2022) and FlashAttention-2 (2023), with paged keys (Kwon et al., vLLM, 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, PagedKV, QuantizedKVPages, RaggedBatch, prefill_attention
from vila_triton.registry import Unsupported
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace, next_power_of_2

from ._heads import dot_layout, load_heads, store_heads
from ._kv_pages import check_pages_supported, kv_bits, load_dequantized_heads, load_page_ids, page_tensors_and_strides
from ._launch import LOG2_E, MAX_GRID_YZ, attention_launch_cost, check_supported
from ._online_softmax import attend_tile, init_softmax, log_sum_exp, normalize
from ._varlen import find_sequence, max_tiles, query_and_head, select_heads

CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
]


def launch_cost(config: Config, b: int, s: int, t: int, g: int, ratio: int, d: int, dtype: str, **_) -> LaunchCost:
    """A query of the chunk sees half of it on average."""
    return attention_launch_cost(config, heads=b * g, rows=s * ratio, keys=t + s // 2 + 1, d=d, dtype=dtype)


def is_valid_config(config: Config, s: int, ratio: int, numerics: str = "fast", **_) -> bool:
    """Return True for the first config under "batch_invariant", else for blocks that a sequence's rows can fill."""
    is_default = all(config[name] == n for name, n in CONFIGS[0].items())
    return is_default if numerics == "batch_invariant" else config["BLOCK_M"] <= max(16, next_power_of_2(s * ratio))


SPACE = SearchSpace(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    is_valid=is_valid_config,
    launch_cost=launch_cost,
)


@triton.jit(do_not_specialize=["num_seqs", "stride_tb"])  # stride_tb changes with the longest sequence
def _prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_pages,  # (codes, scales, zeros)
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
    stride_kp: tl.constexpr,  # of p, l, g and d of the values, then of scales and zeros
    stride_vp: tl.constexpr,
    stride_o: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, row = find_sequence(tile, query_start_loc_ptr, num_seqs, QUERIES_PER_KV, BLOCK_M)
    kv_head = tl.program_id(1).to(tl.int64)
    start = tl.load(query_start_loc_ptr + sequence).to(tl.int64)
    num_queries = (tl.load(query_start_loc_ptr + sequence + 1) - start).to(tl.int32)
    if row >= num_queries * QUERIES_PER_KV:
        return
    context_len = tl.load(context_lens_ptr + sequence)

    query, head, row_mask = query_and_head(row, kv_head, num_queries, QUERIES_PER_KV, BLOCK_M)
    q = load_heads(q_ptr, (start + query) * stride_q[0] + head * stride_q[1], row_mask, stride_q[2], HEAD)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    m_i, l_i, acc = init_softmax(BLOCK_M, HEAD)

    # Whole tiles of the context.
    block_table_ptr += sequence * stride_tb
    full_mask = tl.full([BLOCK_N], 1, tl.int1)
    full_end = context_len // BLOCK_N * BLOCK_N
    for n in range(0, full_end, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        pages = load_page_ids(block_table_ptr, stride_tp, n, context_len, PAGE_SIZE, BLOCK_N)
        k = load_dequantized_heads(k_pages, stride_kp, pages, tokens, kv_head, full_mask, dtype, HEAD, PAGE_SIZE)
        v = load_dequantized_heads(v_pages, stride_vp, pages, tokens, kv_head, full_mask, dtype, HEAD, PAGE_SIZE)
        m_i, l_i, acc = attend_tile(q, k, v, None, scale, m_i, l_i, acc)

    # The tile in which the context ends, if it is not whole.
    k_ptr += kv_head * stride_k[1]
    v_ptr += kv_head * stride_v[1]
    position = context_len + query  # of the queries in their sequence, [BLOCK_M]
    end = context_len + tl.minimum((row + BLOCK_M - 1) // QUERIES_PER_KV + 1, num_queries)  # keys the last query sees
    shift = start - context_len  # from a token's position in its sequence to its row of k and v
    for n in tl.range(full_end, context_len, BLOCK_N, num_stages=1):  # once at most
        tokens = n + tl.arange(0, BLOCK_N)
        cached, new = tokens < context_len, (tokens >= context_len) & (tokens < end)
        k_new = load_heads(k_ptr, (shift + tokens) * stride_k[0], new, stride_k[2], HEAD)
        v_new = load_heads(v_ptr, (shift + tokens) * stride_v[0], new, stride_v[2], HEAD)
        pages = load_page_ids(block_table_ptr, stride_tp, n, context_len, PAGE_SIZE, BLOCK_N)
        k = load_dequantized_heads(k_pages, stride_kp, pages, tokens, kv_head, cached, dtype, HEAD, PAGE_SIZE)
        v = load_dequantized_heads(v_pages, stride_vp, pages, tokens, kv_head, cached, dtype, HEAD, PAGE_SIZE)
        mask = tokens[None, :] <= position[:, None]
        k, v = select_heads(cached, k, k_new), select_heads(cached, v, v_new)
        m_i, l_i, acc = attend_tile(q, k, v, mask, scale, m_i, l_i, acc)

    # Tiles of the chunk that all rows see, then those on the diagonal.
    begin = tl.cdiv(context_len, BLOCK_N) * BLOCK_N
    diagonal = tl.maximum(begin, (context_len + row // QUERIES_PER_KV + 1) // BLOCK_N * BLOCK_N)
    for n in range(begin, diagonal, BLOCK_N):
        first, offs_n = shift + n, tl.arange(0, BLOCK_N).to(tl.int64)
        k = load_heads(k_ptr + first * stride_k[0], offs_n * stride_k[0], None, stride_k[2], HEAD)
        v = load_heads(v_ptr + first * stride_v[0], offs_n * stride_v[0], None, stride_v[2], HEAD)
        m_i, l_i, acc = attend_tile(q, k, v, None, scale, m_i, l_i, acc)
    for n in range(diagonal, end, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        k = load_heads(k_ptr, (shift + tokens) * stride_k[0], tokens < end, stride_k[2], HEAD)
        v = load_heads(v_ptr, (shift + tokens) * stride_v[0], tokens < end, stride_v[2], HEAD)
        mask = tokens[None, :] <= position[:, None]
        m_i, l_i, acc = attend_tile(q, k, v, mask, scale, m_i, l_i, acc)

    # Where the rows lie is worked out anew, behind a load the compiler may not merge with the first one: kept through
    # the loops, it would take the registers that they need.
    row += (tl.load(query_start_loc_ptr + sequence, volatile=True) - start).to(tl.int32)
    query, head, row_mask = query_and_head(row, kv_head, num_queries, QUERIES_PER_KV, BLOCK_M)
    offsets = (start + query) * stride_o[0] + head * stride_o[1]
    store_heads(out_ptr, offsets, row_mask, stride_o[2], normalize(acc, l_i), HEAD)
    if lse_ptr is not None:
        num_heads = tl.num_programs(1) * QUERIES_PER_KV
        tl.store(lse_ptr + (start + query) * num_heads + head, log_sum_exp(m_i, l_i), mask=row_mask)


def fit_tile(config: Config, q: Tensor, pages: KVPages) -> dict[str, int]:
    """The tile of a config for these operands: smaller where the registers would not hold it (bench.compile_sweep)."""
    tile = dict(config)
    if q.element_size() > 2:  # multiplied on the lanes
        return tile | {"BLOCK_M": 16, "BLOCK_N": 16 if q.shape[-1] > 80 else 32, "num_warps": 4, "num_stages": 1}
    if q.shape[-1] > 128:
        return tile | {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4}
    if isinstance(pages, QuantizedKVPages):
        tile["BLOCK_N"] = min(tile["BLOCK_N"], 32)
        if pages.bits == 8 and q.shape[-1] > 32:  # with fewer stages ptxas spills at some widths
            tile["num_stages"] = max(tile["num_stages"], 4)
    return tile


@prefill_attention.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def prefill_attention_triton(
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

    Raises Unsupported for dtypes, devices and pages that are not served and for a softmax_scale that is not positive.
    """
    check_supported("prefill_attention", q, k, v)
    check_pages_supported("prefill_attention", cache.k_pages, cache.v_pages)
    if not softmax_scale > 0:
        raise Unsupported(f"prefill_attention: softmax_scale is {softmax_scale}, expected a positive number")
    config = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    tile = fit_tile(CONFIGS[0] if numerics == "batch_invariant" else config, q, cache.k_pages)
    (s, h, d), g, b = q.shape, k.shape[1], batch.num_seqs
    if g > MAX_GRID_YZ:
        raise Unsupported(f"prefill_attention: {g} KV heads, a launch has room for {MAX_GRID_YZ}")
    out = torch.empty(s, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(s, h, dtype=torch.float32, device=q.device) if return_lse else None
    (k_pages, stride_kp), (v_pages, stride_vp) = map(page_tensors_and_strides, (cache.k_pages, cache.v_pages))
    if out.numel():
        _prefill_attention_kernel[(max_tiles(s, b, h // g, tile["BLOCK_M"]), g)](
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
            stride_q=q.stride(),
            stride_k=k.stride(),
            stride_v=v.stride(),
            stride_kp=stride_kp,
            stride_vp=stride_vp,
            stride_o=out.stride(),
            QUERIES_PER_KV=h // g,
            PAGE_SIZE=cache.page_size,
            HEAD=dot_layout(d, kv_bits(cache.k_pages)),
            **tile,
        )
    return out if lse is None else (out, lse)
