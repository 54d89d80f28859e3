"""Gradients of causal attention of a ragged batch of prompts, none of which has cached context.

`_attention_backward` has the formulas. One program of the first kernel takes BLOCK_M rows of one KV head of one
sequence, where a row is a pair (query, query head of the KV head), and walks the keys BLOCK_N at a time: those that all
its rows see, then the diagonal. One of the second takes BLOCK_M keys and values and walks the rows BLOCK_N at a time,
the diagonal first: so the query heads that share a KV head are summed in one program, in the order of the rows. A
program finds its sequence by bisection; those that have the most to walk start first.

q, out, their gradients [s, h, d], k, v and their gradients [s, g, d], lse and delta [s, h], any strides; head h of the
h/g that share KV head g is row r % (h/g) of its rows. Strides are compile-time constants, as a model has few.

Source: Dao et al., FlashAttention (2022) and FlashAttention-2 (2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import prefill_attention_backward
from vila_triton.registry import Unsupported
from vila_triton.registry.search_space import Config, LaunchCost

from ._attention_backward import (
    BY_TARGET,
    CONFIGS,
    add_grad_kv,
    add_grad_q,
    backward_launch_cost,
    fit_tile,
    load_lse,
    scale_heads,
    search_space,
    sum_of_products,
    zero_heads,
)
from ._heads import dot_layout, load_heads, store_heads
from ._launch import LOG2_E, MAX_GRID_YZ, check_supported
from ._varlen import find_sequence, max_tiles, query_and_head


def launch_cost(config: Config, b: int, s: int, g: int, ratio: int, d: int, dtype: str) -> LaunchCost:
    """Return the cost of both launches; a query sees half of its prompt on average."""
    return backward_launch_cost(config, heads=b * g, rows=s * ratio, keys=s // 2 + 1, d=d, dtype=dtype)


@triton.jit(do_not_specialize=["num_seqs"])
def _prefill_attention_grad_q_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    query_start_loc_ptr,
    num_seqs,
    softmax_scale,
    scale,  # softmax_scale · log2(e)
    stride_do: tl.constexpr,  # of s, h and d
    stride_q: tl.constexpr,
    stride_k: tl.constexpr,  # of s, g and d
    stride_v: tl.constexpr,
    stride_o: tl.constexpr,
    stride_l: tl.constexpr,  # of s and h
    stride_delta: tl.constexpr,
    stride_dq: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
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

    query, head, mask_m = query_and_head(row, kv_head, num_queries, QUERIES_PER_KV, BLOCK_M)
    token = start + query  # [BLOCK_M], the rows of q and out
    q = load_heads(q_ptr, token * stride_q[0] + head * stride_q[1], mask_m, stride_q[2], HEAD)
    grad_out = load_heads(grad_out_ptr, token * stride_do[0] + head * stride_do[1], mask_m, stride_do[2], HEAD)
    out = load_heads(out_ptr, token * stride_o[0] + head * stride_o[1], mask_m, stride_o[2], HEAD)
    delta = sum_of_products(out, grad_out)
    tl.store(delta_ptr + token * stride_delta[0] + head * stride_delta[1], delta, mask=mask_m)
    lse = load_lse(lse_ptr + token * stride_l[0] + head * stride_l[1], mask_m)
    grad_q = zero_heads(BLOCK_M, HEAD)

    k_ptr += start * stride_k[0] + kv_head * stride_k[1]
    v_ptr += start * stride_v[0] + kv_head * stride_v[1]
    diagonal = (row // QUERIES_PER_KV + 1) // BLOCK_N * BLOCK_N  # the keys before it are seen by all rows
    end = tl.minimum((row + BLOCK_M - 1) // QUERIES_PER_KV + 1, num_queries)
    for n in range(0, diagonal, BLOCK_N):
        first, offs_n = tl.cast(n, tl.int64), tl.arange(0, BLOCK_N).to(tl.int64)
        k = load_heads(k_ptr + first * stride_k[0], offs_n * stride_k[0], None, stride_k[2], HEAD)
        v = load_heads(v_ptr + first * stride_v[0], offs_n * stride_v[0], None, stride_v[2], HEAD)
        grad_q = add_grad_q(q, grad_out, k, v, None, scale, lse, delta, grad_q)
    for n in range(diagonal, end, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        offs_n = keys.to(tl.int64)
        k = load_heads(k_ptr, offs_n * stride_k[0], keys < end, stride_k[2], HEAD)
        v = load_heads(v_ptr, offs_n * stride_v[0], keys < end, stride_v[2], HEAD)
        mask = keys[None, :] <= query[:, None]
        grad_q = add_grad_q(q, grad_out, k, v, mask, scale, lse, delta, grad_q)

    offsets = token * stride_dq[0] + head * stride_dq[1]
    store_heads(grad_q_ptr, offsets, mask_m, stride_dq[2], scale_heads(grad_q, softmax_scale), HEAD)


@triton.jit(do_not_specialize=["num_seqs"])
def _prefill_attention_grad_kv_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    query_start_loc_ptr,
    num_seqs,
    softmax_scale,
    scale,
    stride_do: tl.constexpr,
    stride_q: tl.constexpr,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    stride_l: tl.constexpr,
    stride_delta: tl.constexpr,
    stride_dk: tl.constexpr,
    stride_dv: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    sequence, key = find_sequence(tl.program_id(0), query_start_loc_ptr, num_seqs, 1, BLOCK_M)
    kv_head = tl.program_id(1).to(tl.int64)
    start = tl.load(query_start_loc_ptr + sequence).to(tl.int64)
    num_queries = (tl.load(query_start_loc_ptr + sequence + 1) - start).to(tl.int32)
    if key >= num_queries:
        return

    keys = key + tl.arange(0, BLOCK_M)
    mask_m = keys < num_queries
    offs_m = start + keys
    k = load_heads(k_ptr, offs_m * stride_k[0] + kv_head * stride_k[1], mask_m, stride_k[2], HEAD)
    v = load_heads(v_ptr, offs_m * stride_v[0] + kv_head * stride_v[1], mask_m, stride_v[2], HEAD)
    grad_k, grad_v = zero_heads(BLOCK_M, HEAD), zero_heads(BLOCK_M, HEAD)

    # The rows of the queries from the first key on; those on the diagonal do not see all keys.
    begin, end = key * QUERIES_PER_KV, num_queries * QUERIES_PER_KV
    DIAGONAL: tl.constexpr = ((BLOCK_M - 1) * QUERIES_PER_KV + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    for row in range(begin, tl.minimum(begin + DIAGONAL, end), BLOCK_N):
        query, head, mask_n = query_and_head(row, kv_head, num_queries, QUERIES_PER_KV, BLOCK_N)
        token = start + query
        q = load_heads(q_ptr, token * stride_q[0] + head * stride_q[1], mask_n, stride_q[2], HEAD)
        grad_out = load_heads(grad_out_ptr, token * stride_do[0] + head * stride_do[1], mask_n, stride_do[2], HEAD)
        lse = load_lse(lse_ptr + token * stride_l[0] + head * stride_l[1], mask_n)
        delta = tl.load(delta_ptr + token * stride_delta[0] + head * stride_delta[1], mask=mask_n, other=0)
        mask = keys[:, None] <= query[None, :]
        grad_k, grad_v = add_grad_kv(k, v, q, grad_out, mask, scale, lse, delta, grad_k, grad_v)
    for row in range(begin + DIAGONAL, end, BLOCK_N):
        query, head, mask_n = query_and_head(row, kv_head, num_queries, QUERIES_PER_KV, BLOCK_N)
        token = start + query
        q = load_heads(q_ptr, token * stride_q[0] + head * stride_q[1], mask_n, stride_q[2], HEAD)
        grad_out = load_heads(grad_out_ptr, token * stride_do[0] + head * stride_do[1], mask_n, stride_do[2], HEAD)
        lse = load_lse(lse_ptr + token * stride_l[0] + head * stride_l[1], mask_n)
        delta = tl.load(delta_ptr + token * stride_delta[0] + head * stride_delta[1], mask=mask_n, other=0)
        grad_k, grad_v = add_grad_kv(k, v, q, grad_out, None, scale, lse, delta, grad_k, grad_v)

    offsets = offs_m * stride_dk[0] + kv_head * stride_dk[1]
    store_heads(grad_k_ptr, offsets, mask_m, stride_dk[2], scale_heads(grad_k, softmax_scale), HEAD)
    offsets = offs_m * stride_dv[0] + kv_head * stride_dv[1]
    store_heads(grad_v_ptr, offsets, mask_m, stride_dv[2], grad_v, HEAD)


@prefill_attention_backward.impl("triton", configs=CONFIGS, by_target=BY_TARGET, space=search_space(launch_cost))
def prefill_attention_backward_triton(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_start_loc: Tensor,
    softmax_scale: float,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_q [s, h, d], grad_k [s, g, d], grad_v [s, g, d]) in the dtypes of q, k and v.

    Raises Unsupported for dtypes, devices and heads that are not served.
    """
    check_supported("prefill_attention_backward", q, k, v, out, grad_out, lse)
    (s, h, d), g, b = q.shape, k.shape[1], len(query_start_loc) - 1
    if g > MAX_GRID_YZ:
        raise Unsupported(f"prefill_attention_backward: {g} KV heads, a launch has room for {MAX_GRID_YZ}")
    grad_q, grad_k, grad_v = (torch.empty(s, n, d, dtype=q.dtype, device=q.device) for n in (h, g, g))
    delta = torch.empty(s, h, dtype=torch.float32, device=q.device)
    tile = fit_tile({"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}, q)
    if q.numel():
        batch = query_start_loc.contiguous(), b, softmax_scale, softmax_scale * LOG2_E
        constants = {"QUERIES_PER_KV": h // g, "HEAD": dot_layout(d), **tile}
        constants |= {"stride_do": grad_out.stride(), "stride_q": q.stride(), "stride_k": k.stride()}
        constants |= {"stride_v": v.stride(), "stride_l": lse.stride(), "stride_delta": delta.stride()}
        _prefill_attention_grad_q_kernel[(max_tiles(s, b, h // g, tile["BLOCK_M"]), g)](
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            delta,
            grad_q,
            *batch,
            stride_o=out.stride(),
            stride_dq=grad_q.stride(),
            **constants,
        )
        _prefill_attention_grad_kv_kernel[(max_tiles(s, b, 1, tile["BLOCK_M"]), g)](
            grad_out,
            q,
            k,
            v,
            lse,
            delta,
            grad_k,
            grad_v,
            *batch,
            stride_dk=grad_k.stride(),
            stride_dv=grad_v.stride(),
            **constants,
        )
    return grad_q, grad_k, grad_v
