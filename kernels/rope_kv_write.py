"""RoPE of queries and keys, and the rotated keys and the values into their slots: one launch for three.

Programs of a token take BLOCK_H heads each: first those of q, then those of k with the same of v. A token whose slot is
below 0 is rotated and not written.

q [s, h, d], k and v [s, g, d], cos and sin [s, d/2], pages [p, l, g, d], any strides; slot_mapping [s] int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, rope_kv_write
from vila_triton.ops.kv_pages import kv_bytes
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._heads import load_cos_sin, load_heads, rotate, store_heads
from ._kv_pages import check_pages_supported, page_tensors_and_strides
from ._kv_store import store_constants, store_paged_heads

CONFIGS = [
    {"BLOCK_H": 8, "num_warps": 4, "num_stages": 1},
    {"BLOCK_H": 2, "num_warps": 1, "num_stages": 1},
]


def launch_cost(config: Config, s: int, g: int, ratio: int, d: int, l: int, dtype: str, kv: str) -> LaunchCost:
    """Return the cost of one launch for s tokens of g · ratio query heads and g KV heads."""
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
    k_pages,
    v_pages,
    slot_mapping_ptr,
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
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):
    q_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    blocks: tl.constexpr = q_blocks + (G + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    cos_ptr += token * stride_cos[0]
    sin_ptr += token * stride_sin[0]
    cos, sin = load_cos_sin(cos_ptr, sin_ptr, stride_cos[1], stride_sin[1], HEAD)
    if block < q_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
        mask = head < H
        q = load_heads(q_ptr, token * stride_q[0] + head * stride_q[1], mask, stride_q[2], HEAD)
        offsets = token * stride_q_out[0] + head * stride_q_out[1]
        store_heads(q_out_ptr, offsets, mask, stride_q_out[2], rotate(q, cos, sin), HEAD)
        return
    kv_head = (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    mask = kv_head < G
    k = load_heads(k_ptr, token * stride_k[0] + kv_head * stride_k[1], mask, stride_k[2], HEAD)
    k = [x.to(k_ptr.dtype.element_ty) for x in rotate(k, cos, sin)]
    offsets = token * stride_k_out[0] + kv_head * stride_k_out[1]
    store_heads(k_out_ptr, offsets, mask, stride_k_out[2], k, HEAD)
    slot = tl.load(slot_mapping_ptr + token * stride_slot)
    if slot < 0:
        return
    page, row = slot // PAGE_SIZE, slot % PAGE_SIZE
    store_paged_heads(k_pages, stride_kp, page, row, kv_head, mask, k, HEAD, MIN_SCALE)
    v = load_heads(v_ptr, token * stride_v[0] + kv_head * stride_v[1], mask, stride_v[2], HEAD)
    store_paged_heads(v_pages, stride_vp, page, row, kv_head, mask, v, HEAD, MIN_SCALE)


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
    """Write the rotated keys and the values into the pages in place; return rotated q and k, and the pages.

    Raises Unsupported for dtypes, devices and pages that the kernel does not serve.
    """
    check_pages_supported("rope_kv_write", q, k, v, cos, sin, k_pages, v_pages)
    (s, h, d), g = q.shape, k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if s:
        (k_tensors, stride_kp), (v_tensors, stride_vp) = map(page_tensors_and_strides, (k_pages, v_pages))
        _rope_kv_write_kernel[(s * (triton.cdiv(h, BLOCK_H) + triton.cdiv(g, BLOCK_H)),)](
            q,
            k,
            v,
            cos,
            sin,
            q_out,
            k_out,
            k_tensors,
            v_tensors,
            slot_mapping,
            *(x.stride() for x in (q, k, v, cos, sin, q_out, k_out)),
            stride_kp,
            stride_vp,
            *slot_mapping.stride(),
            H=h,
            G=g,
            PAGE_SIZE=k_pages.shape[1],
            BLOCK_H=BLOCK_H,
            **store_constants(d, k_pages),
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,  # bits are to be the reference's
        )
    return q_out, k_out, k_pages, v_pages
