"""pages[slot // l, slot % l] = new token, for keys and values at once, in place.

One program copies one token, BLOCK elements at a time. A slot below 0 means that the token is not cached: its program
returns before it touches anything.

k and v [s, g, d], pages [p, l, g, d], any strides; slot_mapping [s] int64.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import kv_write
from vila_triton.space import SIZE, Config, Launch, Space, cdiv, power_of_two

from ._tile import check

CONFIGS = [
    {"BLOCK": 512, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 128, "num_warps": 1, "num_stages": 1},
]


def launch(config: Config, s: int, g: int, d: int, l: int, dtype: str) -> Launch:
    block, token = config["BLOCK"], g * d
    read = 2 * SIZE[dtype] * min(block, token)
    return Launch(programs=s, bytes=4 * token * SIZE[dtype], stage=read, lanes=16 * block * cdiv(token, block))


SPACE = Space(
    {"BLOCK": [64, 128, 256, 512, 1024, 2048], "num_warps": [1, 2, 4, 8], "num_stages": [1]},
    where=lambda config, g, d, **_: 32 * config["num_warps"] <= config["BLOCK"] <= max(64, power_of_two(g * d)),
    launch=launch,
)


@triton.jit
def _kv_write_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slot_ptr,
    stride_ks,
    stride_kg,
    stride_kd,
    stride_vs,
    stride_vg,
    stride_vd,
    stride_kpp,
    stride_kpl,
    stride_kpg,
    stride_kpd,
    stride_vpp,
    stride_vpl,
    stride_vpg,
    stride_vpd,
    stride_slot,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token * stride_slot)
    if slot < 0:
        return
    page, row = slot // PAGE, slot % PAGE
    k_ptr += token * stride_ks
    v_ptr += token * stride_vs
    k_pages_ptr += page * stride_kpp + row * stride_kpl
    v_pages_ptr += page * stride_vpp + row * stride_vpl
    for start in range(0, G * D, BLOCK):
        offs = start + tl.arange(0, BLOCK)  # [BLOCK]
        g, d = (offs // D).to(tl.int64), (offs % D).to(tl.int64)
        mask = offs < G * D
        k = tl.load(k_ptr + g * stride_kg + d * stride_kd, mask=mask, other=0)
        v = tl.load(v_ptr + g * stride_vg + d * stride_vd, mask=mask, other=0)
        tl.store(k_pages_ptr + g * stride_kpg + d * stride_kpd, k.to(k_pages_ptr.dtype.element_ty), mask=mask)
        tl.store(v_pages_ptr + g * stride_vpg + d * stride_vpd, v.to(v_pages_ptr.dtype.element_ty), mask=mask)


@kv_write.impl("triton", configs=CONFIGS, space=SPACE)
def kv_write_triton(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    *,
    BLOCK: int,
    num_warps: int,
    num_stages: int,
) -> tuple[Tensor, Tensor]:
    check("kv_write", k, v, k_pages, v_pages)
    s, g, d = k.shape
    if s:
        _kv_write_kernel[(s,)](
            k,
            v,
            k_pages,
            v_pages,
            slot_mapping,
            *k.stride(),
            *v.stride(),
            *k_pages.stride(),
            *v_pages.stride(),
            *slot_mapping.stride(),
            G=g,
            D=d,
            PAGE=k_pages.shape[1],
            BLOCK=BLOCK,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return k_pages, v_pages
