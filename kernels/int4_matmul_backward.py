"""The gradient of x · wᵀ by x: grad_out · w, with w dequantized on the way from memory.

A program multiplies BLOCK_M rows of grad_out by BLOCK_K columns of w, over all rows of w. The words of a tile become
numbers in the registers of the lane that loaded them, as in the forward pass. There w is the left operand of `tl.dot`
and stays where it is; here it is summed over its rows, so it is the right operand and goes through shared memory,
which tensor cores read transposed. Weights are rounded as `Int4.rounding` says.

Programs that share columns of w run one after the other, GROUP_M blocks of grad_out at a time, so that these columns
are still in the L2 cache.

grad_out [m, n], any strides; sums are float32; a row of grad_out does not change the result of another.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul_backward
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._int4_gemm import block_pointers, dequantize_block, load_group, load_words
from ._int4_launch import check_int4_call, contiguous_tensors, fit_block_k, rounding_mode, target_flags
from ._launch import grid, rows_and_output, stages_for_dtype

GROUP_M = 8
CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
]
FEW_ROWS = [[256, 1], 0]  # more and smaller blocks, so that there are as many programs as a GPU runs at once
BY_TARGET = dict.fromkeys(("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120"), FEW_ROWS)


def is_promising(config: Config, m: int, group: int, dtype: str, **_: object) -> bool:
    """A block of rows is not mostly padding, one of k lies in a group, a thread sums 8 to 128 elements, and the words
    and gradients under way fit a GPU's shared memory."""
    sums_per_thread = config["BLOCK_M"] * config["BLOCK_K"] // (32 * config["num_warps"])
    bytes_per_stage = config["BLOCK_N"] * (config["BLOCK_M"] * DTYPE_BYTES[dtype] + config["BLOCK_K"] // 2)
    return (
        config["BLOCK_M"] <= max(16, next_power_of_2(m))
        and (group == 32 or group % config["BLOCK_K"] == 0)
        and 8 <= sums_per_thread <= 128
        and bytes_per_stage * config["num_stages"] <= 150_000
    )


def launch_cost(config: Config, m: int, n: int, G: int, group: int, dtype: str, **_: object) -> LaunchCost:
    """Return the cost of multiplying grad_out [m, n] by an int4 weight [n, G · group]."""
    block_m, block_k, size = config["BLOCK_M"], config["BLOCK_K"], DTYPE_BYTES[dtype]
    bytes_per_n = block_m * size + block_k // 2 + 2 * cdiv(block_k, group) * size
    return LaunchCost(
        programs=cdiv(m, block_m) * cdiv(G * group, block_k),
        bytes=n * bytes_per_n + block_m * block_k * size,
        bytes_per_stage=config["BLOCK_N"] * bytes_per_n,
        dot_flops=2 * block_m * block_k * n,
        elementwise_ops=2 * block_k * n,  # to make a number of a code
    )


SPACE = SearchSpace(
    {
        "BLOCK_M": [32, 64, 128],
        "BLOCK_N": [16, 32, 64, 128],
        "BLOCK_K": [64, 128, 256],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4],
    },
    is_promising,
    launch_cost,
)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_backward_kernel(
    grad_out_ptr,
    w,
    grad_x_ptr,
    M,
    N,
    K,
    stride_om,
    stride_on,
    stride_xm,
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
    TILES_N: tl.constexpr = BLOCK_N // 16
    TILES_K: tl.constexpr = BLOCK_K // 64
    DTYPE: tl.constexpr = grad_out_ptr.dtype.element_ty
    blocks_m, blocks_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    pid_m, pid_k = tl.swizzle2d(tl.program_id(0) // blocks_k, tl.program_id(0) % blocks_k, blocks_m, blocks_k, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = pid_k * BLOCK_K
    grad_out_ptrs = grad_out_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * stride_om  # [BLOCK_M, 1]
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for step in range(tl.cdiv(N, BLOCK_N)):
        word_ptrs, top, low = block_pointers(w[0], step, start, N, K, MASK_N, TILES_N, TILES_K)
        words = load_words(word_ptrs, start, K, TILES_K, MASK_K)
        group = load_group(w, top, low, start, N, K, GROUP_SIZE, ROUNDING, TILES_K)
        offs_n = (step * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        # Past n the weights are some numbers of others, and gradients 0.
        mask = offs_n < N if MASK_N else None
        grad_out = tl.load(grad_out_ptrs + offs_n * stride_on, mask=mask, other=0.0 if MASK_N else None)
        weights = dequantize_block(words, group, ROUNDING, DTYPE, ASM, OPAQUE, TILES_N, TILES_K)
        acc = tl.dot(grad_out, weights, acc, input_precision="ieee")
    offs_k = (start + tl.arange(0, BLOCK_K))[None, :]
    offs_m = offs_m[:, None]
    mask = (offs_m < M) & (offs_k < K)
    tl.store(grad_x_ptr + offs_m * stride_xm + offs_k, acc.to(DTYPE), mask=mask)


@int4_matmul_backward.impl("triton", configs=CONFIGS, space=SPACE, by_target=BY_TARGET)
def int4_matmul_backward_triton(
    grad_out: Tensor, w: Int4, *, BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int
) -> Tensor:
    """Return grad_out · w [..., k]; raises Unsupported for dtypes, devices and groups it does not serve."""
    check_int4_call("int4_matmul_backward", grad_out, w)
    n, k = w.shape
    grads, grad_x = rows_and_output(grad_out, k)
    block_k = fit_block_k(BLOCK_K, w)
    if grad_x.numel():
        _int4_matmul_backward_kernel[grid(grad_x, BLOCK_M, block_k)](
            grads,
            contiguous_tensors(w),
            grad_x,
            len(grads),
            n,
            k,
            *grads.stride(),
            grad_x.stride(0),
            GROUP_SIZE=w.group_size,
            ROUNDING=rounding_mode(w, scale_sums=False),
            **target_flags(),
            MASK_N=n % BLOCK_N != 0,
            MASK_K=k % block_k != 0,
            GROUP_M=GROUP_M,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block_k,
            num_warps=num_warps,
            num_stages=stages_for_dtype(num_stages, grad_out),
        )
    return grad_x.view(*grad_out.shape[:-1], k)
