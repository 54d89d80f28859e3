"""RoPE of queries and keys, and the turned keys and the values into their slots: one launch for three.

Programs of a token take BLOCK_H heads each: first those of q, then those of k with the same of v. A token whose slot is
below 0 is turned and not written.

q [s, h, d], k and v [s, g, d], cos and sin [s, d/2], pages [p, l, g, d], any strides; slot_mapping [s] int64.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, rope_kv_write
from vila_triton.ops.kv_write import kv_bytes
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._kv_pages import check_pages_supported, page_tensors_and_strides
from ._kv_store import load_half_heads, rotate, store_constants, store_half_heads, store_paged_heads

CONFIGS = [
    {"BLOCK_H": 8, "num_warps": 4, "num_stages": 1},
    {"BLOCK_H": 2, "num_warps": 1, "num_stages": 1},
]


def launch_cost(config: Config, s: int, g: int, ratio: int, d: int, l: int, dtype: str, kv: str) -> LaunchCost:
    block = config["BLOCK_H"]
    read = min(block, g * ratio) * kv_bytes(1, d, dtype, "plain")
    programs = s * (cdiv(g * ratio, block) + cdiv(g, block))
    return LaunchCost(
        programs=programs, bytes=2 * read + 4 * d, bytes_per_stage=read, elementwise_ops=12 * block * next_power_of_2(d)
    )


SPACE = SearchSpace(
    {"BLOCK_H": [1, 2, 4, 8, 16, 32], "num_warps": [1, 2, 4, 8], "num_stages": [1]},
    is_valid=lambda config, g, ratio, **_: config["BLOCK_H"] <= next_power_of_2(g * ratio),
    launch_cost=launch_cost,
)


@triton.jit
def _rope_kv_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    k_pool,
    v_pool,
    slot_ptr,
    stride_q: tl.constexpr,  # of s, h and d
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    stride_cos: tl.constexpr,  # of s and r
    stride_sin: tl.constexpr,
    stride_q_out: tl.constexpr,
    stride_k_out: tl.constexpr,
    stride_kp: tl.constexpr,
    stride_vp: tl.constexpr,
    stride_slot,
    H: tl.constexpr,
    G: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tl.static_assert(2 * WIDTH == D and BLOCK_W >= WIDTH, "one block covers the pairs of a head")
    of_q: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    blocks: tl.constexpr = of_q + (G + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    pairs = tl.arange(0, BLOCK_W)
    cos = tl.load(cos_ptr + token * stride_cos[0] + pairs * stride_cos[1], mask=pairs < WIDTH, other=0)
    sin = tl.load(sin_ptr + token * stride_sin[0] + pairs * stride_sin[1], mask=pairs < WIDTH, other=0)
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
    if block < of_q:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
        known = head < H
        low, high = load_half_heads(
            q_ptr, token * stride_q[0] + head * stride_q[1], known, stride_q[2], D, WIDTH, BLOCK_W
        )
        low, high = rotate(low, high, cos, sin)
        at = token * stride_q_out[0] + head * stride_q_out[1]
        store_half_heads(q_out_ptr, at, known, stride_q_out[2], low, high, D, WIDTH, BLOCK_W)
        return
    group = (block - of_q) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    known = group < G
    low, high = load_half_heads(k_ptr, token * stride_k[0] + group * stride_k[1], known, stride_k[2], D, WIDTH, BLOCK_W)
    low, high = rotate(low, high, cos, sin)
    low, high = low.to(k_ptr.dtype.element_ty), high.to(k_ptr.dtype.element_ty)
    at = token * stride_k_out[0] + group * stride_k_out[1]
    store_half_heads(k_out_ptr, at, known, stride_k_out[2], low, high, D, WIDTH, BLOCK_W)
    slot = tl.load(slot_ptr + token * stride_slot)
    if slot < 0:
        return
    page, row = slot // PAGE, slot % PAGE
    store_paged_heads(k_pool, stride_kp, page, row, group, known, low, high, D, WIDTH, BITS, TINY, BLOCK_W)
    low, high = load_half_heads(v_ptr, token * stride_v[0] + group * stride_v[1], known, stride_v[2], D, WIDTH, BLOCK_W)
    store_paged_heads(v_pool, stride_vp, page, row, group, known, low, high, D, WIDTH, BITS, TINY, BLOCK_W)


@rope_kv_write.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def rope_kv_write_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    slot_mapping: Tensor,
    *,
    BLOCK_H: int,
    num_warps: int,
    num_stages: int,
) -> tuple[Tensor, Tensor, KVPages, KVPages]:
    check_pages_supported("rope_kv_write", q, k, v, cos, sin, k_pages, v_pages)
    (s, h, d), g = q.shape, k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if s:
        (k_pool, stride_kp), (v_pool, stride_vp) = page_tensors_and_strides(k_pages), page_tensors_and_strides(v_pages)
        _rope_kv_write_kernel[(s * (triton.cdiv(h, BLOCK_H) + triton.cdiv(g, BLOCK_H)),)](
            q,
            k,
            v,
            cos,
            sin,
            q_out,
            k_out,
            k_pool,
            v_pool,
            slot_mapping,
            *(x.stride() for x in (q, k, v, cos, sin, q_out, k_out)),
            stride_kp,
            stride_vp,
            *slot_mapping.stride(),
            H=h,
            G=g,
            PAGE=k_pages.shape[1],
            BLOCK_H=BLOCK_H,
            **store_constants(d, k_pages),
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,  # bits are to be the reference's
        )
    return q_out, k_out, k_pages, v_pages
