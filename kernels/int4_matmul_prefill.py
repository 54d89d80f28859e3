"""x · wᵀ + bias + residual for many rows of x: large pipelined tiles, w in registers of tensor cores (`wgmma`).

A program multiplies BLOCK_N rows of w by BLOCK_M rows of x. Scales multiply weights, which are rounded as
`Int4.rounding` says: that costs one operation for two weights, where scaling sums would need a second accumulator.
Programs that share rows of w run one after the other, GROUP_M blocks of x at a time, so that these rows are still in
the L2 cache.

x [m, k], any strides; sums are float32; a row of x does not change the result of another.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry.search_space import SearchSpace

from ._int4_gemm import int4_gemm_tile, is_promising, launch_cost, store_tile
from ._int4_launch import check_int4_call, fit_block_k, matmul_args, rounding_mode, stages_for_group, target_flags
from ._launch import grid, rows_and_output

GROUP_M = 8
CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
]
# sm_90 holds a group of 128 in one step of the largest tiles: fewer instructions a weight, and scales loaded once.
BY_TARGET = {"sm_80": [[128, 1], 0], "sm_89": [[128, 0], 4], "sm_90": [[384, 2], 3]}
SPACE = SearchSpace(
    {
        "BLOCK_M": [64, 128, 256],
        "BLOCK_N": [64, 128, 256],
        "BLOCK_K": [64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    is_promising,
    launch_cost,
)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_prefill_kernel(
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
    GROUP_SIZE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ASM: tl.constexpr,
    OPAQUE: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.swizzle2d(tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n, blocks_m, blocks_n, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # int64 if N is
    acc = int4_gemm_tile(
        x_ptr,
        w,
        pid_n,
        offs_m,
        0,
        K,
        M,
        N,
        K,
        stride_xm,
        stride_xk,
        GROUP_SIZE,
        ROUNDING,
        ASM,
        OPAQUE,
        MASK_N,
        MASK_K,
        BLOCK_N,
        BLOCK_K,
    )
    store_tile(acc, bias_ptr, residual_ptr, out_ptr, offs_m, offs_n, M, N, stride_om)


@int4_matmul.impl("prefill", configs=CONFIGS, space=SPACE, batch_invariant=True, by_target=BY_TARGET)
def int4_matmul_prefill(
    x: Tensor,
    w: Int4,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    BLOCK_K: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n]; raises Unsupported for dtypes, devices and groups it does not serve."""
    check_int4_call("int4_matmul", x, w)
    rows, out = rows_and_output(x, w.shape[0])
    block_k = fit_block_k(BLOCK_K, w)
    if out.numel():
        _int4_matmul_prefill_kernel[grid(out, BLOCK_M, BLOCK_N)](
            *matmul_args(rows, w, bias, residual, out),
            GROUP_SIZE=w.group_size,
            ROUNDING=rounding_mode(w, scale_sums=False),
            **target_flags(),
            MASK_N=w.shape[0] % 16 != 0,
            MASK_K=w.shape[1] % block_k != 0,
            GROUP_M=GROUP_M,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block_k,
            num_warps=num_warps,
            num_stages=stages_for_group(num_stages, x, w),
        )
    return out.view(*x.shape[:-1], w.shape[0])
