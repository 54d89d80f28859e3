"""Reading pools of pages in kernels, plain ones and `QuantizedPages`. It registers nothing.

A pool is a tuple (values, scales, zeros), the last ones None where there are none, and the strides of all three in one
flat tuple; BITS is 0, 8 or 4. What is read of quantised pages is codes less their zeros: whole numbers that every dtype
of a product holds exactly. The scale of a token is one number for all of a head, so it multiplies scores and weights.

A head is a tuple of one block or two, as `head_blocks` cuts it, or in 4 bits its two halves, each of which is a nibble.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, QuantizedKVPages, page_tensors

from ._launch import cast_operand, check_supported, dot_block, ieee_operand
from ._online_softmax import accumulate_values, head_blocks, load_block, qk_scores, store_block


def page_tensors_and_strides(pages: KVPages) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """The tensors of a pool and their strides: of values p, l, g, d at 0 to 3, of scales at 4 to 6, of zeros 7 to 9."""
    tensors = page_tensors(pages)
    return (*tensors, *[None] * (3 - len(tensors))), tuple(n for x in tensors for n in x.stride())


def check_pages_supported(op_name: str, *pages: KVPages) -> None:
    """Unsupported unless Triton can load the pools."""
    for page_tensor in pages:
        check_supported(op_name, *([page_tensor] if isinstance(page_tensor, Tensor) else page_tensors(page_tensor)[1:]))


def head_constants(d: int, pages: KVPages, single_block: bool = False) -> dict[str, int]:
    """How a kernel reads heads of d numbers: the first WIDTH of them in a block of FIRST, the others in one of REST.

    With `one`, all in one block where bits allow it, which takes fewer registers and more shared memory.
    """
    if isinstance(pages, QuantizedKVPages) and pages.bits == 4:
        return {"BITS": 4, "WIDTH": d // 2, "FIRST": dot_block(d // 2), "REST": dot_block(d // 2)}
    block_d0, block_d1 = (dot_block(d), 0) if single_block else head_blocks(d)
    return {
        "BITS": 8 if isinstance(pages, QuantizedKVPages) else 0,
        "WIDTH": min(block_d0, d),
        "FIRST": block_d0,
        "REST": block_d1,
    }


@triton.jit
def load_masked(ptrs, known):
    """What the pointers point at, 0 where not `known`; all of it if that is None."""
    if known is None:
        return tl.load(ptrs)
    else:  # the compiler visits what comes after a return
        return tl.load(ptrs, mask=known, other=0)


@triton.jit
def pages_and_rows(table_ptr, stride_table, n, known, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """(page, row) of the tokens n to n + BLOCK_N of one sequence, in int64; n is a multiple of BLOCK_N.

    `known` is None if all of them are cached.
    """
    tokens = n + tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        page = tl.load(table_ptr + n // PAGE * stride_table).to(tl.int64)  # one for all of them
    else:
        page = load_masked(table_ptr + tokens // PAGE * stride_table, known).to(tl.int64)  # [BLOCK_N]
    return page, (tokens % PAGE).to(tl.int64)


@triton.jit
def load_page_ids(table_ptr, stride_table, n, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the tokens n to n + BLOCK_N of one sequence, n a multiple of BLOCK_N: [BLOCK_N], or one for all.

    Tokens from `end` on are not looked up.
    """
    if PAGE % BLOCK_N == 0:
        return tl.load(table_ptr + n // PAGE * stride_table, mask=n < end, other=0)
    else:
        tokens = n + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + tokens // PAGE * stride_table, mask=tokens < end, other=0)


@triton.jit
def load_heads(ptr, at, known, stride_d, D: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Heads of plain numbers at the offsets `at` [n]: [n, FIRST] and, if REST is not 0, [n, REST]."""
    first = load_block(ptr, at, known, stride_d, 0, FIRST, WIDTH)
    if REST > 0:
        return (first, load_block(ptr, at, known, stride_d, WIDTH, REST, D))
    else:
        return (first,)


@triton.jit
def store_heads(ptr, at, known, stride_d, head, D: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `read_parts`, in the dtype of the pointer."""
    store_block(ptr, at, known, stride_d, head[0], 0, head[0].shape[1], WIDTH)
    if len(head) > 1:
        store_block(ptr, at, known, stride_d, head[1], WIDTH, head[1].shape[1], D)


@triton.jit
def load_paged_heads(
    pool,
    stride,
    page,
    row,
    group,
    known,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    """The tokens (page, row) of a head in `dtype`, and a tuple of their scales [n]: of one, or none for plain pages."""
    at = page * stride[0] + row * stride[1] + group * stride[2]  # [n]
    if BITS == 4:
        at_zero = page * stride[7] + row * stride[8] + group * stride[9]
        zeros = cast_operand(load_masked(pool[2] + at_zero, known), dtype)[:, None]
        pairs = load_block(pool[0], at, known, stride[3], 0, FIRST, WIDTH)  # [n, FIRST] bytes
        head = (cast_operand(pairs & 15, dtype) - zeros, cast_operand(pairs >> 4, dtype) - zeros)
    else:
        head = [cast_operand(x, dtype) for x in load_heads(pool[0], at, known, stride[3], D, WIDTH, FIRST, REST)]
    if BITS == 0:
        return head, ()
    else:
        at_scale = page * stride[4] + row * stride[5] + group * stride[6]
        scales = load_masked(pool[1] + at_scale, known).to(tl.float32)
        return head, (ieee_operand(scales) if dtype == tl.float32 else scales,)


@triton.jit
def attend_scaled_tile(q, k, k_scale, v, v_scale, known, scale, peak, total, acc):
    """One more tile of keys, k and v [n, d] with scales [n] if any: the running peak, sum and weighted values.

    `known` is None if all of them are cached. Weights times scales are at most 1, as float16 wants them.
    """
    scores = qk_scores(q, k) * scale  # [BLOCK_M, n]
    if len(k_scale) > 0:
        scores = scores * k_scale[0][None, :]
    if known is not None:
        scores = tl.where(known[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))  # [BLOCK_M]
    weights = tl.exp2(scores - new_peak[:, None])
    rescale = tl.exp2(peak - new_peak)
    total = total * rescale + tl.sum(weights, 1)
    if len(v_scale) == 0:
        return new_peak, total, accumulate_values(weights.to(v[0].dtype), v, acc, rescale)
    else:
        weights *= v_scale[0][None, :]
        largest = tl.maximum(tl.max(weights, 1), 1e-30)[:, None]  # of a row: a far token must not make the others 0
        weights = (weights * (1.0 / largest)).to(v[0].dtype)
        first = acc[0] * rescale[:, None] + tl.dot(weights, v[0], input_precision="ieee") * largest
        if len(v) > 1:
            rest = acc[1] * rescale[:, None] + tl.dot(weights, v[1], input_precision="ieee") * largest
            return new_peak, total, (first, rest)
        else:
            return new_peak, total, (first,)


@triton.jit
def attend_paged_tile(
    q, k_pool, stride_k, v_pool, stride_v, page, n, known, group, scale, peak, total, acc,
    D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr,
    REST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`attend_keys` to the cached tokens n to n + BLOCK_N, which lie in the pages `page`."""
    page = page.to(tl.int64)
    row = ((n + tl.arange(0, BLOCK_N)) % PAGE).to(tl.int64)
    k, k_scale = load_paged_heads(k_pool, stride_k, page, row, group, known, q[0].dtype, BITS, D, WIDTH, FIRST, REST)
    v, v_scale = load_paged_heads(v_pool, stride_v, page, row, group, known, q[0].dtype, BITS, D, WIDTH, FIRST, REST)
    return attend_scaled_tile(q, k, k_scale, v, v_scale, known, scale, peak, total, acc)
