"""x · wᵀ + bias for up to 4 rows of x, without tensor cores: every lane multiplies the weights it has loaded.

A program makes BLOCK_N results for BLOCK_M rows of x over its share of k; its warps lie side by side along k. Products
and sums are float32, code - zero is exact, and scales multiply sums of four products, so no weight is rounded (in the
order "fma" each is). Only at the end do lanes add up what they have. With SPLIT_K > 1 the parts are added up in order.

x [m, k], any strides; more rows than BLOCK_M take more programs, those that share rows of w side by side; a row of x
does not change the result of another.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._int4_dequant import (
    UNSCALED,
    check_group_size,
    contiguous_tensors,
    group_ids,
    lane_rows,
    lane_weights,
    rounding_mode,
    target_flags,
    word_pointers,
)
from ._launch import check_supported
from ._splitk_reduce import reduce_splits

CONFIGS = [
    {"BLOCK_M": 1, "BLOCK_N": 32, "BLOCK_K": 256, "SPLIT_K": 1, "num_warps": 4, "num_stages": 1},
    {"BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": 256, "SPLIT_K": 4, "num_warps": 4, "num_stages": 1},
]


def is_promising(config: Config, m: int, group: int, **_: object) -> bool:
    """No block of rows is more than half padding, and a lane keeps at most 64 sums."""
    sums_per_thread = (
        2 * config["BLOCK_M"] * config["BLOCK_N"] // 16 * config["BLOCK_K"] // 64 * 4 // config["num_warps"]
    )
    return config["BLOCK_M"] <= next_power_of_2(m) and 8 <= sums_per_thread <= 64


def launch_cost(config: Config, m: int, n: int, G: int, group: int, dtype: str, **_: object) -> LaunchCost:
    block_m, block_n, size, splits = config["BLOCK_M"], config["BLOCK_N"], DTYPE_BYTES[dtype], config["SPLIT_K"]
    k = cdiv(G * group, splits)
    bytes_per_k = block_m * size + block_n // 2
    return LaunchCost(
        programs=cdiv(m, block_m) * cdiv(n, block_n) * splits,
        bytes=k * bytes_per_k + 2 * block_n * cdiv(k, group) * size + block_m * block_n * (size if splits == 1 else 8),
        bytes_per_stage=config["BLOCK_K"] * bytes_per_k,
        elementwise_ops=(2 + block_m) * block_n * k,
    )


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
def reduce_lanes(parts):
    """[BLOCK_M, TILES_N, TILES_K, 8, 4, 4] -> [BLOCK_M, TILES_N, 8]: words, lanes of a row and tiles of k added up."""
    return tl.sum(tl.sum(tl.sum(parts, 5), 4), 2)


@triton.jit
def load_inputs(x_ptrs, offs_k, K, stride_xk, MASK_K: tl.constexpr):
    """[BLOCK_M, 1, TILES_K, 1, 4, 4] in float32: few numbers, of which each lane loads those it needs."""
    x_ptrs += offs_k.to(tl.int64) * stride_xk
    return (tl.load(x_ptrs, mask=offs_k < K, other=0.0) if MASK_K else tl.load(x_ptrs)).to(tl.float32)


@triton.jit
def dot4(a, b, c, d, x0, x1, x2, x3):
    """The sum of four products in float32."""
    return a.to(tl.float32) * x0 + b.to(tl.float32) * x1 + c.to(tl.float32) * x2 + d.to(tl.float32) * x3


@triton.jit
def store_rows(total, row, offs_m, bias_ptr, out_ptr, M, N, stride_om, HAS_BIAS: tl.constexpr):
    """Store [BLOCK_M, TILES_N, 8] results of rows `row` [TILES_N, 8] of w."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[None]
    mask = (offs_m < M)[:, None, None] & (row < N)[None]
    tl.store(out_ptr + offs_m[:, None, None] * stride_om + row[None], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_gemv_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    SHARE,
    stride_xm,
    stride_xk,
    stride_os,
    stride_om,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    ORDER: tl.constexpr,
    ASM: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_N: tl.constexpr = BLOCK_N // 16
    TILES_K: tl.constexpr = BLOCK_K // 64
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    blocks_m = tl.cdiv(M, BLOCK_M)
    first_tile = (tl.program_id(0) // blocks_m).to(tl.int64) * TILES_N
    offs_m = (tl.program_id(0) % blocks_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * SHARE
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
    for start in range(begin, tl.minimum(begin + SHARE, K), BLOCK_K):
        words = tl.load(word_ptrs, mask=tile_k * 64 + start < K, other=0) if MASK_K else tl.load(word_ptrs)
        offs_k = start + tile_k * 64 + word * 16 + c * 2
        x0 = load_inputs(x_ptrs, offs_k, K, stride_xk, MASK_K)
        x1 = load_inputs(x_ptrs, offs_k + 1, K, stride_xk, MASK_K)
        x2 = load_inputs(x_ptrs, offs_k + 8, K, stride_xk, MASK_K)
        x3 = load_inputs(x_ptrs, offs_k + 9, K, stride_xk, MASK_K)
        group = group_ids(start, tile_k, word, K, GROUP, BLOCK_K)
        zero = tl.load(zeros_ptr + group * N + top)
        low_zero = tl.load(zeros_ptr + group * N + low)
        scale = tl.load(scales_ptr + group * N + top).to(DTYPE)
        low_scale = tl.load(scales_ptr + group * N + low).to(DTYPE)
        w = lane_weights(words, scale, low_scale, zero, low_zero, ORDER, DTYPE, ASM)
        partial = dot4(w[0], w[1], w[4], w[5], x0, x1, x2, x3)
        low_partial = dot4(w[2], w[3], w[6], w[7], x0, x1, x2, x3)
        if ORDER == UNSCALED:
            acc += partial * scale.to(tl.float32)
            low_acc += low_partial * low_scale.to(tl.float32)
        else:
            acc += partial
            low_acc += low_partial
        word_ptrs += TILES_K * 128
    out_ptr += tl.program_id(1).to(tl.int64) * stride_os
    row = (first_tile + tl.arange(0, TILES_N)[:, None]) * 16 + tl.arange(0, 8)[None, :]
    store_rows(reduce_lanes(acc), row, offs_m, bias_ptr, out_ptr, M, N, stride_om, HAS_BIAS)
    store_rows(reduce_lanes(low_acc), row + 8, offs_m, bias_ptr, out_ptr, M, N, stride_om, HAS_BIAS)


@int4_matmul.impl("gemv", configs=CONFIGS, space=SPACE, batch_invariant=True)
def int4_matmul_gemv(
    x: Tensor,
    w: Int4,
    bias: Tensor | None = None,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    BLOCK_K: int,
    SPLIT_K: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    check_supported("int4_matmul", x, w.scales, w.zeros)
    check_group_size("int4_matmul", w)
    (n, k), rows = w.shape, x.reshape(-1, x.shape[-1])  # [m, k]
    m = len(rows)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel():
        qweight, scales, zeros = contiguous_tensors(w)
        k_per_split = triton.cdiv(triton.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
        splits = triton.cdiv(k, k_per_split)  # at most SPLIT_K, and none of them empty
        partial_sums = out[None] if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
        _int4_matmul_gemv_kernel[(triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N), splits)](
            rows,
            qweight,
            scales,
            zeros,
            out if bias is None else bias.contiguous(),
            partial_sums,
            m,
            n,
            k,
            k_per_split,
            *rows.stride(),
            *partial_sums.stride()[:2],
            HAS_BIAS=bias is not None and splits == 1,
            GROUP=w.group_size,
            ORDER=rounding_mode(w, scale_sums=True),
            ASM=target_flags()["ASM"],
            MASK_K=k % BLOCK_K != 0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        if splits > 1:
            reduce_splits(partial_sums, bias, out)
    return out.view(*x.shape[:-1], n)
