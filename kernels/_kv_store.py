"""Writing heads into pools of pages, plain or quantised as `encode` of `vila_triton.ops.kv_pages` does.

A head is held as two halves, its first WIDTH numbers and the others, which is how RoPE pairs them and how codes of 4
bits share a byte. All arithmetic is rounded as written (true division, and callers forbid contraction), so that bits
are the reference's.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl

from vila_triton.ops import KVPages, QuantizedKVPages

from ._kv_pages import head_constants


def store_constants(d: int, pages: KVPages) -> dict[str, Any]:
    """The constants of `put_heads`; TINY is the smallest scale."""
    quantized = isinstance(pages, QuantizedKVPages)
    min_scale = torch.finfo(pages.scales.dtype).smallest_normal if quantized else 0.0
    bits = head_constants(d, pages)["BITS"]
    return {
        "D": d,
        "WIDTH": (d + 1) // 2,
        "BITS": bits,
        "TINY": min_scale,
        "BLOCK_W": triton.next_power_of_2((d + 1) // 2),
    }


@triton.jit
def load_half_heads(ptr, at, known, stride_d, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """The two halves of the heads at the offsets `at` [n], 0 past their ends: [n, BLOCK_W] each."""
    offs = tl.arange(0, BLOCK_W)
    ptrs = ptr + at[:, None] + offs[None, :] * stride_d
    low = tl.load(ptrs, mask=known[:, None] & (offs < WIDTH)[None, :], other=0)
    high = tl.load(ptrs + WIDTH * stride_d, mask=known[:, None] & (offs < D - WIDTH)[None, :], other=0)
    return low, high


@triton.jit
def store_half_heads(ptr, at, known, stride_d, low, high, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """The inverse of `take_heads`, in the dtype of the pointer."""
    offs = tl.arange(0, BLOCK_W)
    ptrs = ptr + at[:, None] + offs[None, :] * stride_d
    tl.store(ptrs, low.to(ptr.dtype.element_ty), mask=known[:, None] & (offs < WIDTH)[None, :])
    tl.store(ptrs + WIDTH * stride_d, high.to(ptr.dtype.element_ty), mask=known[:, None] & (offs < D - WIDTH)[None, :])


@triton.jit
def rotate(low, high, cos, sin):
    """RoPE: the pairs (low, high) turned by the angles, in float32."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def round_half_up(x, step):
    """x in whole steps, halves up."""
    return tl.floor(tl.div_rn(x, tl.broadcast_to(step, x.shape)) + 0.5)


@triton.jit
def store_paged_heads(
    pool,
    stride,
    page,
    row,
    group,
    known,
    low,
    high,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the heads `group` [n] of one token into its slot; the strides are those of `pool_of`.

    No NaN reaches `tl.maximum`, which would drop it.
    """
    at = page * stride[0] + row * stride[1] + group * stride[2]  # [n]
    if BITS == 0:
        store_half_heads(pool[0], at, known, stride[3], low, high, D, WIDTH, BLOCK_W)
    else:
        low, high = low.to(tl.float32), high.to(tl.float32)
        finite = tl.sum(low * 0, 1) + tl.sum(high * 0, 1) == 0  # of a number that is not, it is NaN
        low, high = tl.where(finite[:, None], low, 0.0), tl.where(finite[:, None], high, 0.0)
        at_scale = page * stride[4] + row * stride[5] + group * stride[6]
        dtype = pool[1].dtype.element_ty
        if BITS == 8:
            largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
            scales = tl.maximum(largest * (1 / 127), TINY).to(dtype)
            step = scales.to(tl.float32)[:, None]
            low = tl.minimum(tl.maximum(round_half_up(low, step), -127.0), 127.0)
            high = tl.minimum(tl.maximum(round_half_up(high, step), -127.0), 127.0)
            store_half_heads(pool[0], at, known, stride[3], low, high, D, WIDTH, BLOCK_W)
        else:
            least = tl.minimum(tl.minimum(tl.min(low, 1), tl.min(high, 1)), 0.0)
            most = tl.maximum(tl.maximum(tl.max(low, 1), tl.max(high, 1)), 0.0)
            span = most - least
            scales = tl.maximum(span * (1 / 15), TINY).to(dtype)
            step = scales.to(tl.float32)
            zeros = tl.minimum(tl.maximum(round_half_up(-least, step), 0.0), 15.0)
            low = tl.minimum(tl.maximum(round_half_up(low, step[:, None]) + zeros[:, None], 0.0), 15.0).to(tl.uint8)
            high = tl.minimum(tl.maximum(round_half_up(high, step[:, None]) + zeros[:, None], 0.0), 15.0).to(tl.uint8)
            offs = tl.arange(0, BLOCK_W)
            ptrs = pool[0] + at[:, None] + offs[None, :] * stride[3]
            tl.store(ptrs, low | (high << 4), mask=known[:, None] & (offs < WIDTH)[None, :])
            at_zero = page * stride[7] + row * stride[8] + group * stride[9]
            tl.store(pool[2] + at_zero, tl.where(finite, zeros.to(pool[2].dtype.element_ty), float("nan")), mask=known)
        tl.store(pool[1] + at_scale, tl.where(finite, scales, float("nan")), mask=known)
