"""Heads in kernels: how they are cut into blocks, loaded, rotated and stored.

A head of D numbers is a tuple of one block or of two: its first D0 numbers in a block of BLOCK_D0 lanes, the others in
one of BLOCK_D1. Two blocks leave fewer lanes empty where D is no power of two (72 = 64 + 8), and are the two halves of
a head, which RoPE pairs and which share the bytes of 4-bit pages.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from vila_triton.registry.search_space import next_power_of_2

from ._launch import dot_block


@dataclass(frozen=True)
class HeadLayout:
    """Compile-time constants of the heads that a kernel reads. KV_BITS is that of their pages: 8, 4, or 0 if plain."""

    D: int
    D0: int
    BLOCK_D0: int
    BLOCK_D1: int = 0
    KV_BITS: int = 0


def dot_layout(d: int, kv_bits: int = 0, *, single_block: bool = False) -> HeadLayout:
    """Blocks for `tl.dot`: two where that saves lanes, unless `single_block`; in 4 bits always the two halves.

    A single block takes fewer registers and more shared memory.
    """
    if kv_bits == 4:
        return HeadLayout(d, d // 2, dot_block(d // 2), dot_block(d // 2), kv_bits)
    first = next_power_of_2(d + 1) // 2
    second = dot_block(d - first)
    if single_block or first >= d or first + second >= dot_block(d):
        return HeadLayout(d, d, dot_block(d), 0, kv_bits)
    return HeadLayout(d, first, first, second, kv_bits)


def half_layout(d: int, kv_bits: int = 0) -> HeadLayout:
    """The two halves of a head; the first has one number more if d is odd."""
    half = (d + 1) // 2
    return HeadLayout(d, half, next_power_of_2(half), next_power_of_2(half), kv_bits)


def whole_layout(d: int) -> HeadLayout:
    """One block of any width, for what no `tl.dot` takes."""
    return HeadLayout(d, d, next_power_of_2(d))


@triton.jit
def load_block(ptr, offsets, mask, stride_d, BEGIN: tl.constexpr, BLOCK: tl.constexpr, END: tl.constexpr):
    """Numbers BEGIN to BEGIN + BLOCK of the heads at `offsets` [n], 0 from END on and where `mask` [n] is not set.

    Returns [n, BLOCK]. A mask of None stands for one that is set everywhere.
    """
    dims = BEGIN + tl.arange(0, BLOCK)
    ptrs = ptr + offsets[:, None] + dims.to(tl.int64)[None, :] * stride_d
    full_mask = None
    if BEGIN + BLOCK > END:
        full_mask = (dims < END)[None, :]
        if mask is not None:
            full_mask = full_mask & mask[:, None]
    elif mask is not None:
        full_mask = mask[:, None]
    if full_mask is None:
        return tl.load(ptrs)
    else:  # the compiler visits what comes after a return
        return tl.load(ptrs, mask=full_mask, other=0)


@triton.jit
def store_block(ptr, offsets, mask, stride_d, x, BEGIN: tl.constexpr, END: tl.constexpr):
    """The inverse of `load_block`, in the dtype of the pointer."""
    dims = BEGIN + tl.arange(0, x.shape[1])
    ptrs = ptr + offsets[:, None] + dims.to(tl.int64)[None, :] * stride_d
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask[:, None] & (dims < END)[None, :])


@triton.jit
def load_heads(ptr, offsets, mask, stride_d, HEAD: tl.constexpr):
    """The heads at `offsets` [n], 0 where `mask` [n] is not set: [n, BLOCK_D0] and, if there is one, [n, BLOCK_D1]."""
    first = load_block(ptr, offsets, mask, stride_d, 0, HEAD.BLOCK_D0, HEAD.D0)
    if HEAD.BLOCK_D1 > 0:
        return (first, load_block(ptr, offsets, mask, stride_d, HEAD.D0, HEAD.BLOCK_D1, HEAD.D))
    else:
        return (first,)


@triton.jit
def store_heads(ptr, offsets, mask, stride_d, head, HEAD: tl.constexpr):
    """The inverse of `load_heads`, in the dtype of the pointer."""
    store_block(ptr, offsets, mask, stride_d, head[0], 0, HEAD.D0)
    if len(head) > 1:
        store_block(ptr, offsets, mask, stride_d, head[1], HEAD.D0, HEAD.D)


@triton.jit
def load_cos_sin(cos_ptr, sin_ptr, stride_cos, stride_sin, HEAD: tl.constexpr):
    """The cosines and sines of one token in float32, [1, d/2] each."""
    pairs = tl.arange(0, HEAD.BLOCK_D0)
    cos = tl.load(cos_ptr + pairs.to(tl.int64) * stride_cos, mask=pairs < HEAD.D0, other=0)
    sin = tl.load(sin_ptr + pairs.to(tl.int64) * stride_sin, mask=pairs < HEAD.D0, other=0)
    return cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]


@triton.jit
def rotate(head, cos, sin):
    """RoPE of heads in two halves, in float32: each pair (x[i], x[i + d/2]) is rotated by its angle."""
    low, high = head[0].to(tl.float32), head[1].to(tl.float32)
    return (low * cos - high * sin, high * cos + low * sin)
