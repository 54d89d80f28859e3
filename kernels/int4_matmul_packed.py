"""x · wᵀ + bias + residual, the second rung: a lane loads four words, 16 bytes; the codes are put in order afterwards.

One program computes a BLOCK_M by BLOCK_N tile of the product and walks k in whole tiles of w that lie within one group,
so that a step needs one scale and one zero per row of w; in groups of 32 each word has its own.

x [m, k], any strides; w is rounded to x's dtype as `Int4.rounding` says; the sum is kept in float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry.search_space import SearchSpace

from ._int4_dequant import apply_scale
from ._int4_gemm import block_pointers, is_promising, launch_cost, load_words, load_x, store_tile, x_pointers
from ._int4_launch import check_int4_call, fit_block_k, matmul_args, rounding_mode
from ._launch import cast_operand, grid, rows_and_output

CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
]
SPACE = SearchSpace(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [32, 64, 128, 256],
        "BLOCK_K": [64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    is_promising,
    launch_cost,
)


@triton.jit
def words_to_codes(words, TILES_N: tl.constexpr, TILES_K: tl.constexpr):
    """[TILES_N, TILES_K, 128] words -> codes [16 TILES_N, 64 TILES_K]."""
    codes = (words[:, :, :, None] >> (tl.arange(0, 8) * 4)) & 0xF
    codes = tl.reshape(codes, [TILES_N, TILES_K, 8, 4, 4, 2, 2, 2])  # tile, tile_k, r, c, word, pair, side, half
    codes = tl.permute(codes, [0, 7, 2, 1, 4, 6, 3, 5])  # tile, half, r, tile_k, word, side, c, pair
    return tl.reshape(codes, [16 * TILES_N, 64 * TILES_K])


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_packed_kernel(
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
    MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_N: tl.constexpr = BLOCK_N // 16
    TILES_K: tl.constexpr = BLOCK_K // 64
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    word_ptrs, _, _ = block_pointers(w[0], pid_n, 0, N, K, True, TILES_N, TILES_K)
    x_ptrs = x_pointers(x_ptr, offs_m, 0, M, stride_xm, stride_xk, BLOCK_K)
    row = tl.where(offs_n < N, offs_n, 0)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    tl.assume(K > 0)  # see `int4_gemm_tile`
    for start in range(0, K, BLOCK_K):
        x = load_x(x_ptrs, start, K, BLOCK_K, MASK_K)
        codes = words_to_codes(load_words(word_ptrs, start, K, TILES_K, MASK_K), TILES_N, TILES_K).to(x.dtype)
        if GROUP_SIZE == 32:
            group = tl.minimum((start + offs_k) // 32, (K - 1) // 32).to(tl.int64)[None, :]
        else:
            group = tl.full([1, 1], start // GROUP_SIZE, tl.int64)
        scales = cast_operand(tl.load(w[1] + group * N + row), x.dtype)
        zeros = cast_operand(tl.load(w[2] + group * N + row), x.dtype)
        weights = apply_scale(codes - zeros, codes, scales, zeros, ROUNDING)
        acc = tl.dot(weights, x, acc, input_precision="ieee")
        word_ptrs += TILES_K * 128
        x_ptrs += tl.full([1, 1], BLOCK_K, tl.int64) * stride_xk
    store_tile(acc, bias_ptr, residual_ptr, out_ptr, offs_m, offs_n, M, N, stride_om)


@int4_matmul.impl("packed", configs=CONFIGS, space=SPACE, batch_invariant=True)
def int4_matmul_packed(
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
        _int4_matmul_packed_kernel[grid(out, BLOCK_M, BLOCK_N)](
            *matmul_args(rows, w, bias, residual, out),
            GROUP_SIZE=w.group_size,
            ROUNDING=rounding_mode(w, scale_sums=False),
            MASK_K=w.shape[1] % block_k != 0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block_k,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out.view(*x.shape[:-1], w.shape[0])
