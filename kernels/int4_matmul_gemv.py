"""x · wᵀ + bias + residual for one row of x (blocks of up to 4 rows are possible), without tensor cores: every lane
multiplies the weights it has loaded.

A program computes BLOCK_N results for BLOCK_M rows of x over one split of k; its warps lie side by side along k.
Products and sums are float32, code - zero is exact, and scales multiply sums of four products, so no weight is rounded
(with the rounding "fma" each is). Lanes add up their sums only at the end. With SPLIT_K > 1 the program of a block that
arrives last adds up the sums of all, in the order of the splits.

x [m, k], any strides; more rows than BLOCK_M take more programs, those that share rows of w side by side; a row of x
does not change the result of another.
"""

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._int4_dequant import UNSCALED, group_ids, lane_rows, lane_weights, word_pointers
from ._int4_gemm import launch_cost as gemm_launch_cost
from ._int4_launch import check_int4_call, matmul_args, rounding_mode, target_flags
from ._last_arriver import counting
from ._launch import grid, rows_and_output
from ._splitk_reduce import partial_sums, reduce_and_store, split_k

CONFIGS = [
    {"BLOCK_M": 1, "BLOCK_N": 32, "BLOCK_K": 256, "SPLIT_K": 1, "num_warps": 4, "num_stages": 1},
    {"BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": 256, "SPLIT_K": 4, "num_warps": 4, "num_stages": 1},
]


def is_promising(config: Config, m: int, group: int, **_: object) -> bool:
    """No block of rows is more than half padding, and a lane keeps at most 64 sums."""
    tiles = config["BLOCK_N"] // 16 * config["BLOCK_K"] // 64
    sums_per_lane = 2 * config["BLOCK_M"] * tiles * 4 // config["num_warps"]
    return config["BLOCK_M"] <= next_power_of_2(m) and 8 <= sums_per_lane <= 64


def launch_cost(config: Config, G: int, group: int, **sizes: Any) -> LaunchCost:
    """The loads of the other kernels, without tensor cores."""
    k = cdiv(G * group, config["SPLIT_K"])
    cost = gemm_launch_cost(config, G=G, group=group, **sizes)
    return replace(cost, dot_flops=0, elementwise_ops=(2 + config["BLOCK_M"]) * config["BLOCK_N"] * k)


SPACE = SearchSpace(
    {
        "BLOCK_M": [1, 2, 4],
        "BLOCK_N": [16, 32, 64],
        "BLOCK_K": [128, 256, 512, 1024],
        "SPLIT_K": [1, 2, 4, 8],
        "num_warps": [2, 4, 8],
        "num_stages": [1],
    },
    is_promising,
    launch_cost,
)


@triton.jit
def reduce_lanes(acc):
    """[BLOCK_M, TILES_N, TILES_K, 8, 4, 4] -> [BLOCK_M, TILES_N, 8]: words, lanes of a row and tiles of k added up."""
    return tl.sum(tl.sum(tl.sum(acc, 5), 4), 2)


@triton.jit
def load_inputs(x_ptrs, offs_k, K, stride_xk, MASK_K: tl.constexpr):
    """[BLOCK_M, 1, TILES_K, 1, 4, 4] in float32: few numbers, of which each lane loads those it needs."""
    x_ptrs += offs_k.to(tl.int64) * stride_xk
    return (tl.load(x_ptrs, mask=offs_k < K, other=0.0) if MASK_K else tl.load(x_ptrs)).to(tl.float32)


@triton.jit
def dot4(a, b, c, d, x0, x1, x2, x3):
    """The sum of four products in float32."""
    return a.to(tl.float32) * x0 + b.to(tl.float32) * x1 + c.to(tl.float32) * x2 + d.to(tl.float32) * x3


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_gemv_kernel(
    x_ptr,
    w,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_om,
    parts,
    K_PER_SPLIT,
    SPLITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ASM: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_N: tl.constexpr = BLOCK_N // 16
    TILES_K: tl.constexpr = BLOCK_K // 64
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    block, split = tl.program_id(0), tl.program_id(1)
    blocks_m = tl.cdiv(M, BLOCK_M)
    first_tile = (block // blocks_m).to(tl.int64) * TILES_N
    offs_m = (block % blocks_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    qweight_ptr, scales_ptr, zeros_ptr = w
    begin = split * K_PER_SPLIT
    # Axes: row of x, tile of rows of w, tile of k, r and c of the lane, word.
    tile = first_tile + tl.arange(0, TILES_N)[None, :, None, None, None, None]
    tile_k = tl.arange(0, TILES_K)[None, None, :, None, None, None]
    r = tl.arange(0, 8)[None, None, None, :, None, None]
    c = tl.arange(0, 4)[None, None, None, None, :, None]
    word = tl.arange(0, 4)[None, None, None, None, None, :]
    top, low = lane_rows(tile, r, N)
    word_ptrs = word_pointers(qweight_ptr, tile, begin // 64 + tile_k, r * 4 + c, word, N, K)
    x_ptrs = x_ptr + tl.where(offs_m < M, offs_m, 0)[:, None, None, None, None, None] * stride_xm
    acc = tl.zeros([BLOCK_M, TILES_N, TILES_K, 8, 4, 4], tl.float32)
    low_acc = tl.zeros([BLOCK_M, TILES_N, TILES_K, 8, 4, 4], tl.float32)
    for start in range(begin, tl.minimum(begin + K_PER_SPLIT, K), BLOCK_K):
        words = tl.load(word_ptrs, mask=tile_k * 64 + start < K, other=0) if MASK_K else tl.load(word_ptrs)
        offs_k = start + tile_k * 64 + word * 16 + c * 2
        x0 = load_inputs(x_ptrs, offs_k, K, stride_xk, MASK_K)
        x1 = load_inputs(x_ptrs, offs_k + 1, K, stride_xk, MASK_K)
        x2 = load_inputs(x_ptrs, offs_k + 8, K, stride_xk, MASK_K)
        x3 = load_inputs(x_ptrs, offs_k + 9, K, stride_xk, MASK_K)
        group = group_ids(start, tile_k, word, K, GROUP_SIZE, BLOCK_K)
        zero = tl.load(zeros_ptr + group * N + top)
        low_zero = tl.load(zeros_ptr + group * N + low)
        scale = tl.load(scales_ptr + group * N + top).to(DTYPE)
        low_scale = tl.load(scales_ptr + group * N + low).to(DTYPE)
        weights = lane_weights(words, scale, low_scale, zero, low_zero, ROUNDING, DTYPE, ASM)
        partial = dot4(weights[0], weights[1], weights[4], weights[5], x0, x1, x2, x3)
        low_partial = dot4(weights[2], weights[3], weights[6], weights[7], x0, x1, x2, x3)
        if ROUNDING == UNSCALED:
            acc += partial * scale.to(tl.float32)
            low_acc += low_partial * low_scale.to(tl.float32)
        else:
            acc += partial
            low_acc += low_partial
        word_ptrs += TILES_K * 128
    sums = tl.join(reduce_lanes(acc), reduce_lanes(low_acc))  # [BLOCK_M, TILES_N, 8, 2]
    row = (first_tile + tl.arange(0, TILES_N)[:, None, None]) * 16
    row += tl.arange(0, 8)[None, :, None] + tl.arange(0, 2)[None, None, :] * 8
    reduce_and_store(
        sums,
        offs_m[:, None, None, None],
        row[None],
        block,
        split,
        parts,
        bias_ptr,
        residual_ptr,
        out_ptr,
        M,
        N,
        stride_om,
        SPLITS,
    )


@int4_matmul.impl("gemv", configs=CONFIGS, space=SPACE, batch_invariant=True)
def int4_matmul_gemv(
    x: Tensor,
    w: Int4,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    BLOCK_K: int,
    SPLIT_K: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n]; raises Unsupported for dtypes, devices and groups it does not serve."""
    check_int4_call("int4_matmul", x, w)
    rows, out = rows_and_output(x, w.shape[0])
    if out.numel():
        k_per_split, splits = split_k(w.shape[1], BLOCK_K, SPLIT_K)
        (blocks,) = grid(out, BLOCK_M, BLOCK_N)
        with counting(x.device):
            _int4_matmul_gemv_kernel[blocks, splits](
                *matmul_args(rows, w, bias, residual, out),
                partial_sums(out, splits, blocks),
                k_per_split,
                SPLITS=splits,
                GROUP_SIZE=w.group_size,
                ROUNDING=rounding_mode(w, scale_sums=True),
                ASM=target_flags()["ASM"],
                MASK_K=w.shape[1] % BLOCK_K != 0,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                num_warps=num_warps,
                num_stages=num_stages,
            )
    return out.view(*x.shape[:-1], w.shape[0])
