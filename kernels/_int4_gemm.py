"""Int4 weights as the left operand of `tl.dot`, and the loop that multiplies with them."""

import triton
import triton.language as tl

from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, cdiv, next_power_of_2

from ._int4_dequant import UNSCALED, group_ids, lane_rows, lane_weights, lanes_to_tile, word_pointers


def is_promising(config: Config, m: int, group: int, dtype: str, **_: object) -> bool:
    """A block of rows is not mostly padding, one of k lies in a group, a thread sums 8 to 128 elements, and the words
    and inputs under way fit a GPU's shared memory."""
    sums_per_thread = config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"])
    bytes_per_stage = config["BLOCK_K"] * (config["BLOCK_M"] * DTYPE_BYTES[dtype] + config["BLOCK_N"] // 2)
    within_group = group == 32 or group % config["BLOCK_K"] == 0
    return (
        config["BLOCK_M"] <= max(16, next_power_of_2(m))
        and within_group
        and 8 <= sums_per_thread <= 128
        and (bytes_per_stage * config["num_stages"] <= 200_000)
    )


def launch_cost(config: Config, m: int, n: int, G: int, group: int, dtype: str, **_: object) -> LaunchCost:
    """Return the cost of multiplying x [m, G · group] by an int4 weight of n rows; a program takes one split of k."""
    block_m, block_n, size, splits = config["BLOCK_M"], config["BLOCK_N"], DTYPE_BYTES[dtype], config.get("SPLIT_K", 1)
    k = cdiv(G * group, splits)
    bytes_per_k = block_m * size + block_n // 2  # of x and of the weight
    out_bytes = block_m * block_n * (size if splits == 1 else 8)  # a partial sum is written and read in float32
    return LaunchCost(
        programs=cdiv(m, block_m) * cdiv(n, block_n) * splits,
        bytes=k * bytes_per_k + 2 * block_n * cdiv(k, group) * size + out_bytes,
        bytes_per_stage=config["BLOCK_K"] * bytes_per_k,
        dot_flops=2 * block_m * block_n * k,
        elementwise_ops=2 * block_n * k,  # to make a number of a code
    )


@triton.jit
def block_pointers(qweight_ptr, pid_n, start, N, K, MASK_N: tl.constexpr, TILES_N: tl.constexpr, TILES_K: tl.constexpr):
    """Pointers to the words of a block of w from input `start` on, [TILES_N, TILES_K, 128], and the rows of w that each
    lane holds codes of, top and low (`lane_rows`). Without MASK_N n is whole tiles."""
    tile = (tl.cast(pid_n, tl.int64) * TILES_N + tl.arange(0, TILES_N))[:, None, None, None]
    tile_k = (start // 64 + tl.arange(0, TILES_K))[None, :, None]
    lane = tl.arange(0, 32)[None, None, :, None]
    if MASK_N:
        top, low = lane_rows(tile, lane // 4, N)
    else:
        top = tl.where(tile * 16 < N, tile, 0) * 16 + lane // 4
        low = top + 8
    word = tl.arange(0, 128)[None, None, :]
    word_ptrs = word_pointers(qweight_ptr, tl.reshape(tile, [TILES_N, 1, 1]), tile_k, 0, word, N, K)
    return word_ptrs, top, low


@triton.jit
def x_pointers(x_ptr, offs_m, start, M, stride_xm, stride_xk, BLOCK_K: tl.constexpr):
    """Pointers to x, transposed: [BLOCK_K, BLOCK_M]. Rows past the end read row 0 and are not stored, which spares a
    mask in every load."""
    offs_k = start + tl.arange(0, BLOCK_K)
    return x_ptr + tl.where(offs_m < M, offs_m, 0)[None, :] * stride_xm + offs_k.to(tl.int64)[:, None] * stride_xk


@triton.jit
def load_words(word_ptrs, start, K, TILES_K: tl.constexpr, MASK_K: tl.constexpr):
    """Words [TILES_N, TILES_K, 128], those past the last tile 0. A tile is one axis, lanes and words, as Triton then
    keeps it together in shared memory, where it would otherwise put the words of a lane of all tiles side by side: the
    lanes of a warp would meet in the same banks."""
    if MASK_K:
        tile_k = (start // 64 + tl.arange(0, TILES_K))[None, :, None]
        return tl.load(word_ptrs, mask=tile_k < (K + 63) // 64, other=0)
    else:
        return tl.load(word_ptrs)


@triton.jit
def load_x(x_ptrs, start, K, BLOCK_K: tl.constexpr, MASK_K: tl.constexpr):
    """[BLOCK_K, BLOCK_M]; 0 past k, where a weight is -zero."""
    if MASK_K:
        return tl.load(x_ptrs, mask=(start + tl.arange(0, BLOCK_K) < K)[:, None], other=0.0)
    else:
        return tl.load(x_ptrs)


@triton.jit
def load_group(w, top, low, start, N, K, GROUP_SIZE: tl.constexpr, ROUNDING: tl.constexpr, TILES_K: tl.constexpr):
    """The zeros of rows `top` and `low` (`lane_rows`) for the step from input `start` on, then their scales; where they
    are not used, zeros stand in for them. Past k, those of the last group."""
    tile_k = tl.arange(0, TILES_K)[None, :, None, None]
    start = tl.minimum(start, K - 1)
    group = group_ids(start, tile_k, tl.arange(0, 4)[None, None, None, :], K, GROUP_SIZE, 64 * TILES_K)
    zero = tl.load(w[2] + group * N + top)
    low_zero = tl.load(w[2] + group * N + low)
    if ROUNDING == UNSCALED:
        return zero, low_zero, zero, low_zero
    else:
        return zero, low_zero, tl.load(w[1] + group * N + top), tl.load(w[1] + group * N + low)


@triton.jit
def dequantize_block(
    words,
    group,
    ROUNDING: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    OPAQUE: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_K: tl.constexpr,
):
    """Words of a step [TILES_N, TILES_K, 128] and their group (`load_group`) -> weights [BLOCK_N, BLOCK_K]."""
    zero, low_zero, scale, low_scale = group
    words = tl.reshape(words, [TILES_N, TILES_K, 32, 4])
    a, b, c, d, e, f, g, h = lane_weights(words, scale, low_scale, zero, low_zero, ROUNDING, DTYPE, ASM)
    return lanes_to_tile(a, b, c, d, e, f, g, h, OPAQUE, TILES_N, TILES_K)


@triton.jit
def multiply_add(weights, x, acc, w, rows, start, N, GROUP_SIZE: tl.constexpr, ROUNDING: tl.constexpr):
    """acc + weights · x. If weights are unscaled, the scales of `rows` [BLOCK_N] of w multiply the product."""
    if ROUNDING == UNSCALED:
        group = tl.full([1], start // GROUP_SIZE, tl.int64)
        scale = tl.load(w[1] + group * N + rows).to(x.dtype).to(tl.float32)  # [BLOCK_N]
        return acc + tl.dot(weights, x, input_precision="ieee") * scale[:, None]
    else:
        return tl.dot(weights, x, acc, input_precision="ieee")


@triton.jit
def int4_gemm_tile(
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

    There is at least one input. Were that not known, the sums would be set to 0 on a second path to the end of the
    loop, which lets the compiler for sm_90 wait for every product before the next begins. Zeros and scales, which are
    too narrow to be copied ahead, are loaded a step before they are used.
    """
    tl.static_assert(BLOCK_K % 64 == 0, "a block of k is whole tiles")
    tl.assume(begin < end)
    TILES_N: tl.constexpr = BLOCK_N // 16
    TILES_K: tl.constexpr = BLOCK_K // 64
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    word_ptrs, top, low = block_pointers(w[0], pid_n, begin, N, K, MASK_N, TILES_N, TILES_K)
    x_ptrs = x_pointers(x_ptr, offs_m, begin, M, stride_xm, stride_xk, BLOCK_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # int64 if N is
    rows = tl.where(offs_n < N, offs_n, 0)
    acc = tl.zeros([BLOCK_N, offs_m.shape[0]], tl.float32)
    group = load_group(w, top, low, begin, N, K, GROUP_SIZE, ROUNDING, TILES_K)
    for start in range(begin, end, BLOCK_K):
        words = load_words(word_ptrs, start, K, TILES_K, MASK_K)
        x = load_x(x_ptrs, start, K, BLOCK_K, MASK_K)
        next_group = load_group(w, top, low, start + BLOCK_K, N, K, GROUP_SIZE, ROUNDING, TILES_K)
        weights = dequantize_block(words, group, ROUNDING, DTYPE, ASM, OPAQUE, TILES_N, TILES_K)
        acc = multiply_add(weights, x, acc, w, rows, start, N, GROUP_SIZE, ROUNDING)
        group = next_group
        word_ptrs += TILES_K * 128
        x_ptrs += tl.full([1, 1], BLOCK_K, tl.int64) * stride_xk
    return acc


@triton.jit
def store_tile(acc, bias_ptr, residual_ptr, out_ptr, offs_m, offs_n, M, N, stride_om):
    """Store acc [BLOCK_N, BLOCK_M], plus bias and residual unless they are None, to rows `offs_m` and columns `offs_n`
    of out."""
    mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[None, :] * N + offs_n[:, None]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_m[None, :] * stride_om + offs_n[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
