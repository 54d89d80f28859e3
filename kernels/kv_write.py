"""pages[slot // l, slot % l] = new token, for keys and values at once, in place, quantised if the pages are.

One program takes BLOCK_G heads of one token, keys and values. A slot below 0 means that the token is not cached: its
programs return before they touch anything.

k and v [s, g, d], pages [p, l, g, d], any strides; slot_mapping [s] int64.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, kv_write
from vila_triton.ops.kv_write import kv_bytes
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._kv_pages import check_pages_supported, page_tensors_and_strides
from ._kv_store import load_half_heads, store_constants, store_paged_heads

CONFIGS = [
    {"BLOCK_G": 8, "num_warps": 4, "num_stages": 1},
    {"BLOCK_G": 1, "num_warps": 1, "num_stages": 1},
]


def launch_cost(config: Config, s: int, g: int, d: int, l: int, dtype: str, kv: str) -> LaunchCost:
    heads = min(config["BLOCK_G"], g)
    read = 2 * heads * kv_bytes(1, d, dtype, "plain")
    return LaunchCost(
        programs=s * cdiv(g, config["BLOCK_G"]),
        bytes=read + 2 * heads * kv_bytes(1, d, dtype, kv),
        bytes_per_stage=read,
        elementwise_ops=(8 if kv == "plain" else 24) * config["BLOCK_G"] * next_power_of_2(d),
    )


SPACE = SearchSpace(
    {"BLOCK_G": [1, 2, 4, 8, 16, 32], "num_warps": [1, 2, 4, 8], "num_stages": [1]},
    is_valid=lambda config, g, **_: config["BLOCK_G"] <= next_power_of_2(g),
    launch_cost=launch_cost,
)


@triton.jit
def _kv_write_kernel(
    k_ptr,
    v_ptr,
    k_pool,
    v_pool,
    slot_ptr,
    stride_k: tl.constexpr,  # of s, g and d
    stride_v: tl.constexpr,
    stride_kp: tl.constexpr,
    stride_vp: tl.constexpr,
    stride_slot,
    G: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tl.static_assert(BLOCK_W >= WIDTH and 2 * WIDTH >= D, "two blocks cover the head")
    blocks: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    token = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.load(slot_ptr + token * stride_slot)
    if slot < 0:
        return
    page, row = slot // PAGE, slot % PAGE
    group = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    known = group < G
    low, high = load_half_heads(k_ptr, token * stride_k[0] + group * stride_k[1], known, stride_k[2], D, WIDTH, BLOCK_W)
    store_paged_heads(k_pool, stride_kp, page, row, group, known, low, high, D, WIDTH, BITS, TINY, BLOCK_W)
    low, high = load_half_heads(v_ptr, token * stride_v[0] + group * stride_v[1], known, stride_v[2], D, WIDTH, BLOCK_W)
    store_paged_heads(v_pool, stride_vp, page, row, group, known, low, high, D, WIDTH, BITS, TINY, BLOCK_W)


@kv_write.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def kv_write_triton(
    k: Tensor,
    v: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    slot_mapping: Tensor,
    *,
    BLOCK_G: int,
    num_warps: int,
    num_stages: int,
) -> tuple[KVPages, KVPages]:
    check_pages_supported("kv_write", k, v, k_pages, v_pages)
    s, g, d = k.shape
    if k.numel():
        (k_pool, stride_kp), (v_pool, stride_vp) = page_tensors_and_strides(k_pages), page_tensors_and_strides(v_pages)
        _kv_write_kernel[(s * triton.cdiv(g, BLOCK_G),)](
            k,
            v,
            k_pool,
            v_pool,
            slot_mapping,
            k.stride(),
            v.stride(),
            stride_kp,
            stride_vp,
            *slot_mapping.stride(),
            G=g,
            PAGE=k_pages.shape[1],
            BLOCK_G=BLOCK_G,
            **store_constants(d, k_pages),
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,  # bits are to be the reference's
        )
    return k_pages, v_pages
