"""Reading the paged KV cache in kernels, plain pages and `QuantizedKVPages`.

Pages are a tuple (values, scales, zeros) of pointers, the last ones None where there are none, and the strides of all
three in one flat tuple. What is read of quantized pages is codes less their zeros: whole numbers that every dtype of a
product holds exactly. The scale of a token is one number for all of a head, so it multiplies scores and weights. In 4
bits a head is its two halves, each of which is a nibble of its bytes.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, page_tensors

from ._heads import load_block, load_heads
from ._launch import cast_operand, check_supported, ieee_operand
from ._online_softmax import add_values, dot_qk, softmax_weights


def kv_bits(pages: KVPages) -> int:
    """Bits of a code, 0 for plain pages."""
    return 0 if isinstance(pages, Tensor) else pages.bits


def page_tensors_and_strides(pages: KVPages) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Strides: those of values p, l, g and d at 0 to 3, of scales p, l and g at 4 to 6, of zeros at 7 to 9."""
    tensors = page_tensors(pages)
    return (*tensors, *[None] * (3 - len(tensors))), tuple(n for x in tensors for n in x.stride())


def check_pages_supported(op_name: str, *tensors_or_pages: KVPages) -> None:
    """Unsupported unless Triton can load them all; codes always can be loaded."""
    for x in tensors_or_pages:
        check_supported(op_name, *([x] if isinstance(x, Tensor) else page_tensors(x)[1:]))


@triton.jit
def load_page_ids(block_table_ptr, stride, n, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of tokens n to n + BLOCK_N of one sequence, n a multiple of BLOCK_N: [BLOCK_N], or one for all of them.

    block_table_ptr is the row of the sequence. Tokens from `end` on are not looked up.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        return tl.load(block_table_ptr + tl.cast(n // PAGE_SIZE, tl.int64) * stride, mask=n < end, other=0)
    else:
        tokens = n + tl.arange(0, BLOCK_N)
        return tl.load(block_table_ptr + (tokens // PAGE_SIZE).to(tl.int64) * stride, mask=tokens < end, other=0)


@triton.jit
def load_masked(ptrs, mask):
    """The numbers at ptrs, 0 where `mask` is not set; a mask of None is set everywhere."""
    if mask is None:
        return tl.load(ptrs)
    else:  # the compiler visits what comes after a return
        return tl.load(ptrs, mask=mask, other=0)


@triton.jit
def load_paged_heads(
    pages, strides, page_ids, tokens, kv_head, mask, dtype: tl.constexpr, HEAD: tl.constexpr, PAGE_SIZE: tl.constexpr
):
    """One head of the cached tokens [n], which lie in the pages `page_ids`: (the heads in `dtype`, their scales).

    Scales are a tuple of one tensor [n]; of none for plain pages.
    """
    page, row = page_ids.to(tl.int64), (tokens % PAGE_SIZE).to(tl.int64)
    offsets = page * strides[0] + row * strides[1] + kv_head * strides[2]  # [n]
    if HEAD.KV_BITS == 4:
        zero_offsets = page * strides[7] + row * strides[8] + kv_head * strides[9]
        zeros = cast_operand(load_masked(pages[2] + zero_offsets, mask), dtype)[:, None]
        pairs = load_block(pages[0], offsets, mask, strides[3], 0, HEAD.BLOCK_D0, HEAD.D0)  # bytes
        head = (cast_operand(pairs & 15, dtype) - zeros, cast_operand(pairs >> 4, dtype) - zeros)
    else:
        head = [cast_operand(x, dtype) for x in load_heads(pages[0], offsets, mask, strides[3], HEAD)]
    if HEAD.KV_BITS == 0:
        return head, ()
    else:
        scale_offsets = page * strides[4] + row * strides[5] + kv_head * strides[6]
        scales = load_masked(pages[1] + scale_offsets, mask).to(tl.float32)
        return head, (ieee_operand(scales) if dtype == tl.float32 else scales,)


@triton.jit
def load_dequantized_heads(
    pages, strides, page_ids, tokens, kv_head, mask, dtype: tl.constexpr, HEAD: tl.constexpr, PAGE_SIZE: tl.constexpr
):
    """As `load_paged_heads`, with the scales multiplied in."""
    head, scales = load_paged_heads(pages, strides, page_ids, tokens, kv_head, mask, dtype, HEAD, PAGE_SIZE)
    if len(scales) == 0:
        return head
    else:
        return [(x.to(tl.float32) * scales[0][:, None]).to(x.dtype) for x in head]


@triton.jit
def attend_paged_tile(
    q, k_pages, stride_k, v_pages, stride_v, page_ids, tokens, mask, kv_head, scale, m_i, l_i, acc,
    HEAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Attention to one more tile of cached tokens [n], which lie in the pages `page_ids`: the new (m_i, l_i, acc).

    `mask` [n] is None if all of them are there. Weights times value scales are divided by the largest of their row
    before the product, so that float16 neither overflows nor loses them; the product is multiplied back.
    """
    dtype: tl.constexpr = q[0].dtype
    k, k_scales = load_paged_heads(k_pages, stride_k, page_ids, tokens, kv_head, mask, dtype, HEAD, PAGE_SIZE)
    v, v_scales = load_paged_heads(v_pages, stride_v, page_ids, tokens, kv_head, mask, dtype, HEAD, PAGE_SIZE)
    scores = dot_qk(q, k) * scale
    if len(k_scales) > 0:
        scores = scores * k_scales[0][None, :]
    if mask is not None:
        scores = tl.where(mask[None, :], scores, float("-inf"))
    weights, rescale, m_i, l_i = softmax_weights(scores, 1.0, m_i, l_i)
    if len(v_scales) == 0:
        return m_i, l_i, add_values(weights.to(dtype), v, acc, rescale)
    else:
        weights *= v_scales[0][None, :]
        largest = tl.maximum(tl.max(weights, 1), 1e-30)[:, None]  # of a row: a far token must not make the others 0
        weights = (weights * (1.0 / largest)).to(dtype)
        first = acc[0] * rescale[:, None] + tl.dot(weights, v[0], input_precision="ieee") * largest
        if len(v) > 1:
            second = acc[1] * rescale[:, None] + tl.dot(weights, v[1], input_precision="ieee") * largest
            return m_i, l_i, (first, second)
        else:
            return m_i, l_i, (first,)
