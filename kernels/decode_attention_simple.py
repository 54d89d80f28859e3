"""softmax(q kᵀ · scale) v of one new token per sequence over its cached pages.

The readable variant: one program takes all query heads of one KV head of one sequence (padded to the 16 rows that
`tl.dot` needs), so each cached key and value is read once. It walks the cached tokens BLOCK_N at a time with an online
softmax in base 2, from the first to the last. Under "batch_invariant" the config is always the first one.

q [b, h, d], pages [p, l, g, d], any strides; token j of a sequence is row j % l of page block_table[sequence, j // l].
Strides are compile-time constants, so that the compiler can prove alignment and load heads of 72 in 16-byte pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import PagedKV, decode_attention
from vila_triton.registry import Unsupported
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace

from ._heads import dot_layout, load_heads, store_heads
from ._kv_pages import load_page_ids, load_paged_heads, page_tensors_and_strides
from ._launch import LOG2_E, attention_launch_cost, check_supported, dot_block, stages_for_dtype
from ._online_softmax import add_values, dot_qk, init_softmax, normalize, softmax_weights

CONFIGS = [
    {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_N": 16, "num_warps": 2, "num_stages": 3},
]


def launch_cost(config: Config, b: int, t: int, g: int, ratio: int, d: int, dtype: str, **_) -> LaunchCost:
    """Return the cost of one launch over b sequences of t keys each."""
    return attention_launch_cost(config, heads=b * g, rows=ratio, keys=t, d=d, dtype=dtype)


SPACE = SearchSpace(
    {"BLOCK_N": [16, 32, 64, 128], "num_warps": [1, 2, 4, 8], "num_stages": [1, 2, 3, 4, 5]},
    launch_cost=launch_cost,
)


@triton.jit(do_not_specialize=["stride_tb"])  # changes with the longest sequence
def _decode_attention_simple_kernel(
    q_ptr,
    k_pages,
    v_pages,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    scale,
    stride_q: tl.constexpr,  # of b, h and d
    stride_k: tl.constexpr,  # of p, l, g and d
    stride_v: tl.constexpr,
    stride_tb,
    stride_tp,
    stride_o: tl.constexpr,
    G: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= QUERIES_PER_KV and BLOCK_M >= 16, "one block covers the heads of a KV head")
    tl.static_assert(BLOCK_N >= 16, "tl.dot needs 16 columns")
    sequence = (tl.program_id(0) // G).to(tl.int64)
    kv_head = (tl.program_id(0) % G).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + sequence)

    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < QUERIES_PER_KV
    head = kv_head * QUERIES_PER_KV + rows  # [BLOCK_M]
    q = load_heads(q_ptr, sequence * stride_q[0] + head * stride_q[1], row_mask, stride_q[2], HEAD)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    m_i, l_i, acc = init_softmax(BLOCK_M, HEAD)

    block_table_ptr += sequence * stride_tb
    for n in range(0, seq_len, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        mask = tokens < seq_len
        pages = load_page_ids(block_table_ptr, stride_tp, n, seq_len, PAGE_SIZE, BLOCK_N)
        k, _ = load_paged_heads(k_pages, stride_k, pages, tokens, kv_head, mask, dtype, HEAD, PAGE_SIZE)
        v, _ = load_paged_heads(v_pages, stride_v, pages, tokens, kv_head, mask, dtype, HEAD, PAGE_SIZE)
        scores = tl.where(mask[None, :], dot_qk(q, k) * scale, float("-inf"))  # [BLOCK_M, BLOCK_N]
        weights, rescale, m_i, l_i = softmax_weights(scores, 1.0, m_i, l_i)
        acc = add_values(weights.to(dtype), v, acc, rescale)

    offsets = sequence * stride_o[0] + head * stride_o[1]
    store_heads(out_ptr, offsets, row_mask, stride_o[2], normalize(acc, l_i), HEAD)


@decode_attention.impl("simple", configs=CONFIGS, space=SPACE, batch_invariant=True)
def decode_attention_simple(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
    *,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """Return attention [b, h, d] in q's dtype; raises Unsupported for `return_lse` and for quantized pages."""
    if return_lse or not isinstance(cache.k_pages, Tensor) or not isinstance(cache.v_pages, Tensor):
        raise Unsupported("decode_attention: the simple kernel has no log-sum-exp and reads no quantized pages")
    check_supported("decode_attention", q, cache.k_pages, cache.v_pages)
    config = {"BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    config = CONFIGS[0] if numerics == "batch_invariant" else config
    config = {**config, "num_stages": stages_for_dtype(config["num_stages"], q)}
    (b, h, d), (_, page_size, g, _) = q.shape, cache.k_pages.shape
    (k_pages, stride_k), (v_pages, stride_v) = map(page_tensors_and_strides, (cache.k_pages, cache.v_pages))
    out = torch.empty(b, h, d, dtype=q.dtype, device=q.device)
    if out.numel():
        _decode_attention_simple_kernel[(b * g,)](
            q,
            k_pages,
            v_pages,
            cache.block_table,
            seq_lens.contiguous(),
            out,
            softmax_scale * LOG2_E,
            q.stride(),
            stride_k,
            stride_v,
            *cache.block_table.stride(),
            out.stride(),
            G=g,
            QUERIES_PER_KV=h // g,
            PAGE_SIZE=page_size,
            HEAD=dot_layout(d, single_block=True),
            BLOCK_M=dot_block(h // g),
            **config,
        )
    return out
