"""The loop of int4 products with few rows of x, which should cost what reading the weights costs.

Each lane loads the words of a step into its registers while the step before is multiplied: no weight goes through
shared memory. A step lies in one group, so that a lane needs one zero a row of w, and a sum of a step one scale; in
groups of 32 each word has its own.
"""

import triton
import triton.language as tl

from ._int4_dequant import UNSCALED, group_ids, lane_rows, lane_weights, lanes_to_tile, word_pointers
from ._int4_gemm import load_x, x_pointers


@triton.jit
def lane_pointers(qweight_ptr, pid_n, begin, N, K, MASK_N: tl.constexpr, TILES_N: tl.constexpr):
    """Pointers to the words of a block of w from input `begin` on, of one tile of k: [1, TILES_N, 32, 4], and the rows
    of w that each lane holds codes of (`lane_rows`), [TILES_N, 1, 32, 1]. Without MASK_N n is whole tiles."""
    tile = pid_n.to(tl.int64) * TILES_N + tl.arange(0, TILES_N)[None, :, None, None]
    lane = tl.arange(0, 32)[None, None, :, None]
    word_ptrs = word_pointers(qweight_ptr, tile, begin // 64, lane, tl.arange(0, 4)[None, None, None, :], N, K)
    tile = pid_n.to(tl.int64) * TILES_N + tl.arange(0, TILES_N)[:, None, None, None]
    if MASK_N:
        top, low = lane_rows(tile, lane // 4, N)
    else:
        top = tl.where(tile * 16 < N, tile, 0) * 16 + lane // 4
        low = top + 8
    return word_ptrs, top, low


@triton.jit
def group_of_step(step, GROUP_SIZE: tl.constexpr, TILES_K: tl.constexpr):
    """The group [1] that a step lies in, by which the compiler sees that addresses grow by the same amount a step."""
    if GROUP_SIZE % (64 * TILES_K) == 0:
        return tl.full([1], step // (GROUP_SIZE // (64 * TILES_K)), tl.int64)
    else:  # all of k
        return tl.zeros([1], tl.int64)


@triton.jit
def groups_of_words(step, K, GROUP_SIZE: tl.constexpr, TILES_K: tl.constexpr):
    """The group of each word of a step, which is counted from input 0 on."""
    if GROUP_SIZE % (64 * TILES_K) == 0:
        return group_of_step(step, GROUP_SIZE, TILES_K)
    else:
        tile_k = tl.arange(0, TILES_K)[None, :, None, None]
        word = tl.arange(0, 4)[None, None, None, :]
        return group_ids(step * (64 * TILES_K), tile_k, word, K, GROUP_SIZE, 64 * TILES_K)


@triton.jit
def load_step(
    word_ptrs,
    zeros_ptr,
    x_ptrs,
    top,
    low,
    step,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    MASK_K: tl.constexpr,
    TILES_K: tl.constexpr,
):
    """The words of a step [TILES_N, TILES_K, 32, 4], the zeros of its top and low rows, and x [BLOCK_K, BLOCK_M].

    Words are loaded with tiles of rows of w along the second axis, so that the warps of a program share these out as
    they do in `tl.dot`.
    """
    tile_k = tl.arange(0, TILES_K)[:, None, None, None]
    if MASK_K:
        words = tl.load(word_ptrs + tile_k * 128, mask=step * TILES_K + tile_k < (K + 63) // 64, other=0)
    else:
        words = tl.load(word_ptrs + tile_k * 128)
    group = groups_of_words(step, K, GROUP_SIZE, TILES_K)
    zero = tl.load(zeros_ptr + group * N + top)
    low_zero = tl.load(zeros_ptr + group * N + low)
    return tl.permute(words, 1, 0, 2, 3), zero, low_zero, load_x(x_ptrs, step * 64 * TILES_K, K, 64 * TILES_K, MASK_K)


@triton.jit
def int4_decode_tile(
    x_ptr,
    w,
    pid_n,
    offs_m,
    begin,
    end,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    GROUP_SIZE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ASM: tl.constexpr,
    OPAQUE: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N rows of w times rows `offs_m` of x over the inputs from `begin` to `end`: [BLOCK_N, BLOCK_M] float32.

    `begin` is a multiple of BLOCK_K, and there is at least one input.
    """
    tl.static_assert(BLOCK_K % 64 == 0, "a block of k is whole tiles")
    tl.assume(begin >= 0)
    tl.assume(begin < end)
    TILES_N: tl.constexpr = BLOCK_N // 16
    TILES_K: tl.constexpr = BLOCK_K // 64
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    word_ptrs, top, low = lane_pointers(w[0], pid_n, begin, N, K, MASK_N, TILES_N)
    x_ptrs = x_pointers(x_ptr, offs_m, begin, M, stride_xm, stride_xk, BLOCK_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # int64 if N is
    rows = tl.where(offs_n < N, offs_n, 0)
    acc = tl.zeros([BLOCK_N, offs_m.shape[0]], tl.float32)
    first, steps = begin // BLOCK_K, tl.cdiv(end, BLOCK_K)
    words, zero, low_zero, x = load_step(word_ptrs, w[2], x_ptrs, top, low, first, N, K, GROUP_SIZE, MASK_K, TILES_K)
    for step in range(first, steps):
        word_ptrs += TILES_K * 128
        x_ptrs += tl.full([1, 1], BLOCK_K, tl.int64) * stride_xk
        next_words, next_zero, next_low_zero, next_x = words, zero, low_zero, x
        if step + 1 < steps:
            next_words, next_zero, next_low_zero, next_x = load_step(
                word_ptrs, w[2], x_ptrs, top, low, step + 1, N, K, GROUP_SIZE, MASK_K, TILES_K
            )
        if ROUNDING == UNSCALED:
            a, b, c, d, e, f, g, h = lane_weights(words, zero, zero, zero, low_zero, ROUNDING, DTYPE, ASM)
            scale = (
                tl.load(w[1] + group_of_step(step, GROUP_SIZE, TILES_K) * N + rows).to(DTYPE).to(tl.float32)
            )  # [BLOCK_N]
            weights = lanes_to_tile(a, b, c, d, e, f, g, h, OPAQUE, TILES_N, TILES_K)
            acc += tl.dot(weights, x, input_precision="ieee") * scale[:, None]
        else:
            group = groups_of_words(step, K, GROUP_SIZE, TILES_K)
            scale = tl.load(w[1] + group * N + top)
            low_scale = tl.load(w[1] + group * N + low)
            a, b, c, d, e, f, g, h = lane_weights(words, scale, low_scale, zero, low_zero, ROUNDING, DTYPE, ASM)
            weights = lanes_to_tile(a, b, c, d, e, f, g, h, OPAQUE, TILES_N, TILES_K)
            acc = tl.dot(weights, x, acc, input_precision="ieee")
        words, zero, low_zero, x = next_words, next_zero, next_low_zero, next_x
    return acc
