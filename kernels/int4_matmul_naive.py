"""x · wᵀ + bias + residual, the first rung: the word of each element of w is loaded on its own, and its code extracted.

One program computes a BLOCK_M by BLOCK_N tile of the product. It serves every group size and both roundings, and is
slow: a word is loaded eight times, four bytes at a time.

x [m, k], any strides; w in the tiles of `ops.int4_tiles.pack_tiles`; the sum is kept in float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul

from ._int4_dequant import apply_scale
from ._int4_launch import matmul_args, rounding_mode
from ._launch import cast_operand, check_supported, grid, rows_and_output

CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
]


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_naive_kernel(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    qweight_ptr, scales_ptr, zeros_ptr = w
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask_m = (offs_m < M)[:, None]
    mask_n = offs_n < N
    tiles_k = (K + 63) // 64
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        row = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + row[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m & (row < K), other=0.0)
        offs_k = row[:, None]
        mask_w = (offs_k < K) & mask_n  # [BLOCK_K, BLOCK_N]
        tile = offs_n // 16 * tiles_k + offs_k // 64
        lane = offs_n % 8 * 4 + offs_k % 8 // 2
        nibble = offs_k % 2 * 4 + offs_k % 16 // 8 * 2 + offs_n % 16 // 8
        words = tl.load(qweight_ptr + tile * 128 + lane * 4 + offs_k % 64 // 16, mask=mask_w, other=0)
        codes = ((words >> (nibble * 4).to(tl.int32)) & 0xF).to(x.dtype)
        scales = cast_operand(tl.load(scales_ptr + offs_k // GROUP_SIZE * N + offs_n, mask=mask_w, other=0.0), x.dtype)
        zeros = cast_operand(tl.load(zeros_ptr + offs_k // GROUP_SIZE * N + offs_n, mask=mask_w, other=0.0), x.dtype)
        weights = apply_scale(codes - zeros, codes, scales, zeros, ROUNDING)
        acc = tl.dot(x, weights, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs_m[:, None] * N + offs_n, mask=mask_m & mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n)


@int4_matmul.impl("naive", configs=CONFIGS, batch_invariant=True)
def int4_matmul_naive(
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
    """Return x · wᵀ + bias + residual [..., n]; raises Unsupported for dtypes and devices it does not serve."""
    check_supported("int4_matmul", x, w.scales, w.zeros)
    rows, out = rows_and_output(x, w.shape[0])
    if out.numel():
        _int4_matmul_naive_kernel[grid(out, BLOCK_M, BLOCK_N)](
            *matmul_args(rows, w, bias, residual, out),
            GROUP_SIZE=w.group_size,
            ROUNDING=rounding_mode(w, scale_sums=False),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out.view(*x.shape[:-1], w.shape[0])
