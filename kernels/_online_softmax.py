"""Online softmax over tiles of keys, for the attention kernels that take many queries at once. It registers nothing.

A head of D numbers is one block of a power of two, or two (72 = 64 + 8) where that leaves fewer lanes empty: FIRST and
REST, as `head_blocks` says. In kernels it is a tuple of one tensor or of two, and so is what is summed of heads.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from vila_triton.registry.search_space import next_power_of_2

from ._launch import dot_block


def head_blocks(d: int) -> tuple[int, int]:
    """(FIRST, REST): blocks that cover a head of d numbers. REST is 0 if a second block would save nothing."""
    block_d0 = next_power_of_2(d + 1) // 2
    block_d1 = dot_block(d - block_d0)
    return (block_d0, block_d1) if block_d0 < d and block_d0 + block_d1 < dot_block(d) else (dot_block(d), 0)


@triton.jit
def load_block(ptr, at, known, stride_d, FROM: tl.constexpr, BLOCK: tl.constexpr, END: tl.constexpr):
    """Numbers FROM to FROM + BLOCK of the rows at the offsets `at` [n], 0 from END on or if not `known`: [n, BLOCK].

    `known` is None if every row is.
    """
    dims = FROM + tl.arange(0, BLOCK)
    ptrs = ptr + at[:, None] + dims[None, :] * stride_d
    mask = None
    if FROM + BLOCK > END:
        mask = (dims < END)[None, :]
        if known is not None:
            mask = mask & known[:, None]
    elif known is not None:
        mask = known[:, None]
    if mask is None:
        return tl.load(ptrs)
    else:  # the compiler visits what comes after a return
        return tl.load(ptrs, mask=mask, other=0)


@triton.jit
def store_block(ptr, at, known, stride_d, x, FROM: tl.constexpr, BLOCK: tl.constexpr, END: tl.constexpr):
    """The inverse of `load_block`, in the dtype of the pointer."""
    dims = FROM + tl.arange(0, BLOCK)
    ptrs = ptr + at[:, None] + dims[None, :] * stride_d
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=known[:, None] & (dims < END)[None, :])


@triton.jit
def init_softmax(BLOCK_M: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """(peak, total, acc) before the first tile. The peak is finite, so that -inf - peak is never NaN."""
    peak = tl.full([BLOCK_M], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, FIRST], tl.float32)
    if REST > 0:
        return peak, total, (acc, tl.zeros([BLOCK_M, REST], tl.float32))
    else:
        return peak, total, (acc,)


@triton.jit
def qk_scores(q, k):
    """q kᵀ of heads: [m, n]."""
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if len(q) > 1:
        scores = tl.dot(q[1], tl.trans(k[1]), scores, input_precision="ieee")
    return scores


@triton.jit
def accumulate_values(weights, v, acc, rescale):
    """acc · rescale + weights v: heads again."""
    first = tl.dot(weights, v[0], acc[0] * rescale[:, None], input_precision="ieee")
    if len(v) > 1:
        return (first, tl.dot(weights, v[1], acc[1] * rescale[:, None], input_precision="ieee"))
    else:
        return (first,)


@triton.jit
def divide_heads(head, divisors):
    """Heads [n, d], each over its divisor [n]."""
    return [x / divisors[:, None] for x in head]


@triton.jit
def attend_tile(q, k, v, visible, scale, peak, total, acc):
    """One more tile of keys, k and v [n, d]: the running peak, sum of weights and weighted values, in base 2.

    `visible` is None if every query sees every key. The explicit fma leaves the compiler no choice of rounding, so a
    tile gives the same bits with a mask that hides nothing as without one; and a tile that hides all changes nothing.
    """
    scores = qk_scores(q, k)  # [BLOCK_M, n]
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)  # [BLOCK_M]
    weights = tl.exp2(tl.fma(scores, scale, -new_peak[:, None]))
    rescale = tl.exp2(peak - new_peak)
    total = tl.fma(total, rescale, tl.sum(weights, 1))
    return new_peak, total, accumulate_values(weights.to(v[0].dtype), v, acc, rescale)


@triton.jit
def log_sum_exp(peak, total):
    """The natural logarithm of the sum of exponentials, -inf for a row that has seen no key."""
    return tl.where(total == 0.0, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
