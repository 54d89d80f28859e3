"""Gradients of softmax(q kᵀ · scale) v of every position of an image over every position of it.

`_attention_backward` has the formulas. One program of the first kernel takes BLOCK_M queries of one head of one image
and walks all keys BLOCK_N at a time; one of the second takes BLOCK_M keys and walks all queries. Whole tiles of keys
have no mask, the rest of the image has one; queries beyond the image are zeros of no weight.

q, k, v, out and their gradients [b, s, h, d], lse and delta [b, s, h], any strides. Strides are compile-time constants:
a vision tower has one of each.

Source: Dao et al., FlashAttention (2022) and FlashAttention-2 (2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import encoder_attention_backward
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


def launch_cost(config: Config, b: int, s: int, h: int, d: int, dtype: str) -> LaunchCost:
    """Return the cost of both launches over b images of s positions each."""
    return backward_launch_cost(config, heads=b * h, rows=s, keys=s, d=d, dtype=dtype)


@triton.jit
def _encoder_attention_grad_q_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    softmax_scale,
    scale,  # softmax_scale · log2(e)
    S,
    stride_do: tl.constexpr,  # of b, s, h and d
    stride_q: tl.constexpr,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    stride_o: tl.constexpr,
    stride_l: tl.constexpr,  # of b, s and h
    stride_delta: tl.constexpr,
    stride_dq: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    mask_m = rows < S
    q_ptr += image * stride_q[0] + head * stride_q[2]
    out_ptr += image * stride_o[0] + head * stride_o[2]
    grad_out_ptr += image * stride_do[0] + head * stride_do[2]
    q = load_heads(q_ptr, rows * stride_q[1], mask_m, stride_q[3], HEAD)
    grad_out = load_heads(grad_out_ptr, rows * stride_do[1], mask_m, stride_do[3], HEAD)
    out = load_heads(out_ptr, rows * stride_o[1], mask_m, stride_o[3], HEAD)
    delta = sum_of_products(out, grad_out)
    delta_ptr += image * stride_delta[0] + head * stride_delta[2]
    tl.store(delta_ptr + rows * stride_delta[1], delta, mask=mask_m)
    lse_ptr += image * stride_l[0] + head * stride_l[2]
    lse = load_lse(lse_ptr + rows * stride_l[1], mask_m)
    grad_q = zero_heads(BLOCK_M, HEAD)

    k_ptr += image * stride_k[0] + head * stride_k[2]
    v_ptr += image * stride_v[0] + head * stride_v[2]
    full_end = S // BLOCK_N * BLOCK_N
    for n in range(0, full_end, BLOCK_N):
        start, offs_n = tl.cast(n, tl.int64), tl.arange(0, BLOCK_N).to(tl.int64)
        k = load_heads(k_ptr + start * stride_k[1], offs_n * stride_k[1], None, stride_k[3], HEAD)
        v = load_heads(v_ptr + start * stride_v[1], offs_n * stride_v[1], None, stride_v[3], HEAD)
        grad_q = add_grad_q(q, grad_out, k, v, None, scale, lse, delta, grad_q)
    for n in tl.range(full_end, S, BLOCK_N, num_stages=1):  # once at most
        offs_n = n + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_n = offs_n < S
        k = load_heads(k_ptr, offs_n * stride_k[1], mask_n, stride_k[3], HEAD)
        v = load_heads(v_ptr, offs_n * stride_v[1], mask_n, stride_v[3], HEAD)
        grad_q = add_grad_q(q, grad_out, k, v, mask_n[None, :], scale, lse, delta, grad_q)

    grad_q_ptr += image * stride_dq[0] + head * stride_dq[2]
    store_heads(grad_q_ptr, rows * stride_dq[1], mask_m, stride_dq[3], scale_heads(grad_q, softmax_scale), HEAD)


@triton.jit
def _encoder_attention_grad_kv_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    softmax_scale,
    scale,
    S,
    stride_do: tl.constexpr,
    stride_q: tl.constexpr,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    stride_l: tl.constexpr,
    stride_delta: tl.constexpr,
    stride_dk: tl.constexpr,
    stride_dv: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    keys = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    mask_m = keys < S
    k_ptr += image * stride_k[0] + head * stride_k[2]
    v_ptr += image * stride_v[0] + head * stride_v[2]
    k = load_heads(k_ptr, keys * stride_k[1], mask_m, stride_k[3], HEAD)
    v = load_heads(v_ptr, keys * stride_v[1], mask_m, stride_v[3], HEAD)
    grad_k, grad_v = zero_heads(BLOCK_M, HEAD), zero_heads(BLOCK_M, HEAD)

    q_ptr += image * stride_q[0] + head * stride_q[2]
    grad_out_ptr += image * stride_do[0] + head * stride_do[2]
    lse_ptr += image * stride_l[0] + head * stride_l[2]
    delta_ptr += image * stride_delta[0] + head * stride_delta[2]
    for n in range(0, S, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_n = rows < S
        q = load_heads(q_ptr, rows * stride_q[1], mask_n, stride_q[3], HEAD)
        grad_out = load_heads(grad_out_ptr, rows * stride_do[1], mask_n, stride_do[3], HEAD)
        lse = load_lse(lse_ptr + rows * stride_l[1], mask_n)
        delta = tl.load(delta_ptr + rows * stride_delta[1], mask=mask_n, other=0)
        grad_k, grad_v = add_grad_kv(k, v, q, grad_out, None, scale, lse, delta, grad_k, grad_v)

    grad_k_ptr += image * stride_dk[0] + head * stride_dk[2]
    grad_v_ptr += image * stride_dv[0] + head * stride_dv[2]
    store_heads(grad_k_ptr, keys * stride_dk[1], mask_m, stride_dk[3], scale_heads(grad_k, softmax_scale), HEAD)
    store_heads(grad_v_ptr, keys * stride_dv[1], mask_m, stride_dv[3], grad_v, HEAD)


@encoder_attention_backward.impl("triton", configs=CONFIGS, by_target=BY_TARGET, space=search_space(launch_cost))
def encoder_attention_backward_triton(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_q, grad_k, grad_v) [b, s, h, d]; raises Unsupported for dtypes and heads it does not serve."""
    check_supported("encoder_attention_backward", q, k, v, out, grad_out, lse)
    b, s, h, d = q.shape
    if h > MAX_GRID_YZ:
        raise Unsupported(f"encoder_attention_backward: {h} heads, a launch has room for {MAX_GRID_YZ}")
    grad_q, grad_k, grad_v = (torch.empty(b, s, h, d, dtype=q.dtype, device=q.device) for _ in range(3))
    delta = torch.empty(b, s, h, dtype=torch.float32, device=q.device)
    tile = fit_tile({"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}, q)
    scales = softmax_scale, softmax_scale * LOG2_E
    strides = {"stride_do": grad_out.stride(), "stride_q": q.stride(), "stride_k": k.stride(), "stride_v": v.stride()}
    strides |= {"stride_l": lse.stride(), "stride_delta": delta.stride()}
    for first in range(0, b if q.numel() else 0, MAX_GRID_YZ):
        images = slice(first, first + MAX_GRID_YZ)
        grid = (triton.cdiv(s, tile["BLOCK_M"]), h, min(b - first, MAX_GRID_YZ))
        _encoder_attention_grad_q_kernel[grid](
            *(x[images] for x in (grad_out, q, k, v, out, lse, delta, grad_q)),
            *scales,
            s,
            **strides,
            stride_o=out.stride(),
            stride_dq=grad_q.stride(),
            HEAD=dot_layout(d),
            **tile,
        )
        _encoder_attention_grad_kv_kernel[grid](
            *(x[images] for x in (grad_out, q, k, v, lse, delta, grad_k, grad_v)),
            *scales,
            s,
            **strides,
            stride_dk=grad_k.stride(),
            stride_dv=grad_v.stride(),
            HEAD=dot_layout(d),
            **tile,
        )
    return grad_q, grad_k, grad_v
