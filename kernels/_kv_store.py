"""Writing heads into the pages of the KV cache, plain or quantized as `quantize_kv` of `vila_triton.ops` does.

Heads come in their two halves (`half_layout`), which share the bytes of 4-bit pages. All arithmetic is rounded as
written (true division, and launchers forbid contraction), so that the bits are the reference's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages

from ._heads import half_layout, store_block, store_heads
from ._kv_pages import kv_bits


def store_constants(d: int, pages: KVPages) -> dict[str, Any]:
    """The constants of `store_paged_heads`; MIN_SCALE is the smallest scale, a normal number."""
    min_scale = 0.0 if isinstance(pages, Tensor) else torch.finfo(pages.scales.dtype).smallest_normal
    return {"HEAD": half_layout(d, kv_bits(pages)), "MIN_SCALE": min_scale}


@triton.jit
def round_half_up(x, step):
    """x / step, rounded to whole numbers, halves up."""
    return tl.floor(tl.div_rn(x, tl.broadcast_to(step, x.shape)) + 0.5)


@triton.jit
def store_paged_heads(
    pages, strides, page, row, kv_head, mask, head, HEAD: tl.constexpr, MIN_SCALE: tl.constexpr
):  # fmt: skip
    """Write the heads `kv_head` [n] of one token into its slot; pages and strides as in `page_tensors_and_strides`.

    No NaN reaches `tl.maximum`, which would drop it.
    """
    offsets = page * strides[0] + row * strides[1] + kv_head * strides[2]  # [n]
    if HEAD.KV_BITS == 0:
        store_heads(pages[0], offsets, mask, strides[3], head, HEAD)
    else:
        low, high = head[0].to(tl.float32), head[1].to(tl.float32)
        is_finite = tl.sum(low * 0, 1) + tl.sum(high * 0, 1) == 0  # of a number that is not, it is NaN
        low, high = tl.where(is_finite[:, None], low, 0.0), tl.where(is_finite[:, None], high, 0.0)
        scale_offsets = page * strides[4] + row * strides[5] + kv_head * strides[6]
        dtype = pages[1].dtype.element_ty
        if HEAD.KV_BITS == 8:
            largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
            scales = tl.maximum(largest * (1 / 127), MIN_SCALE).to(dtype)
            step = scales.to(tl.float32)[:, None]
            codes = [tl.minimum(tl.maximum(round_half_up(x, step), -127.0), 127.0) for x in (low, high)]
            store_heads(pages[0], offsets, mask, strides[3], codes, HEAD)
        else:
            lowest = tl.minimum(tl.minimum(tl.min(low, 1), tl.min(high, 1)), 0.0)
            highest = tl.maximum(tl.maximum(tl.max(low, 1), tl.max(high, 1)), 0.0)
            scales = tl.maximum((highest - lowest) * (1 / 15), MIN_SCALE).to(dtype)
            step = scales.to(tl.float32)
            zeros = tl.minimum(tl.maximum(round_half_up(-lowest, step), 0.0), 15.0)
            low = tl.minimum(tl.maximum(round_half_up(low, step[:, None]) + zeros[:, None], 0.0), 15.0).to(tl.uint8)
            high = tl.minimum(tl.maximum(round_half_up(high, step[:, None]) + zeros[:, None], 0.0), 15.0).to(tl.uint8)
            store_block(pages[0], offsets, mask, strides[3], low | (high << 4), 0, HEAD.D0)
            zero_offsets = page * strides[7] + row * strides[8] + kv_head * strides[9]
            zeros = tl.where(is_finite, zeros.to(pages[2].dtype.element_ty), float("nan"))
            tl.store(pages[2] + zero_offsets, zeros, mask=mask)
        tl.store(pages[1] + scale_offsets, tl.where(is_finite, scales, float("nan")), mask=mask)
