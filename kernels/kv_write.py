"""pages[slot // l, slot % l] = new token, for keys and values at once, in place, quantized if the pages are.

One program takes BLOCK_G heads of one token, keys and values. A slot below 0 means that the token is not cached: its
programs return before they touch anything.

k and v [s, g, d], pages [p, l, g, d], any strides; slot_mapping [s] int64.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, kv_write
from vila_triton.ops.kv_pages import kv_bytes
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._heads import load_heads
from ._kv_pages import check_pages_supported, page_tensors_and_strides
from ._kv_store import store_constants, store_paged_heads

CONFIGS = [
    {"BLOCK_G": 8, "num_warps": 4, "num_stages": 1},
    {"BLOCK_G": 1, "num_warps": 1, "num_stages": 1},
]


def launch_cost(config: Config, s: int, g: int, d: int, l: int, dtype: str, kv: str) -> LaunchCost:
    """Return the cost of writing s tokens of g heads into pages of the format `kv`."""
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
    k_pages,
    v_pages,
    slot_mapping_ptr,
    stride_k: tl.constexpr,  # of s, g and d
    stride_v: tl.constexpr,
    stride_kp: tl.constexpr,
    stride_vp: tl.constexpr,
    stride_slot,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):
    blocks: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    token = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token * stride_slot)
    if slot < 0:
        return
    page, row = slot // PAGE_SIZE, slot % PAGE_SIZE
    kv_head = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    mask = kv_head < G
    k = load_heads(k_ptr, token * stride_k[0] + kv_head * stride_k[1], mask, stride_k[2], HEAD)
    store_paged_heads(k_pages, stride_kp, page, row, kv_head, mask, k, HEAD, MIN_SCALE)
    v = load_heads(v_ptr, token * stride_v[0] + kv_head * stride_v[1], mask, stride_v[2], HEAD)
    store_paged_heads(v_pages, stride_vp, page, row, kv_head, mask, v, HEAD, MIN_SCALE)


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
    """Write k and v into the pages and return these; raises Unsupported for dtypes and devices it does not serve."""
    check_pages_supported("kv_write", k, v, k_pages, v_pages)
    s, g, d = k.shape
    if k.numel():
        (k_tensors, stride_kp), (v_tensors, stride_vp) = map(page_tensors_and_strides, (k_pages, v_pages))
        _kv_write_kernel[(s * triton.cdiv(g, BLOCK_G),)](
            k,
            v,
            k_tensors,
            v_tensors,
            slot_mapping,
            k.stride(),
            v.stride(),
            stride_kp,
            stride_vp,
            *slot_mapping.stride(),
            G=g,
            PAGE_SIZE=k_pages.shape[1],
            BLOCK_G=BLOCK_G,
            **store_constants(d, k_pages),
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,  # bits are to be the reference's
        )
    return k_pages, v_pages
