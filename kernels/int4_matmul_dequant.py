"""x · wᵀ + bias + residual in two steps, for many rows of x: dequantize the weight, then torch's matrix product.

The whole weight is in memory, in x's dtype and rounded as `Int4.rounding` says, for as long as the call takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul, linear
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv

from ._int4_gemm import block_pointers, dequantize_block, load_group, load_words
from ._int4_launch import check_int4_call, contiguous_tensors, rounding_mode, target_flags
from ._launch import grid

CONFIGS = [
    {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1},
    {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1},
]


def launch_cost(config: Config, m: int, n: int, G: int, group: int, dtype: str, **_: object) -> LaunchCost:
    """Return the cost of dequantizing a weight [n, G · group], and of torch's product with m rows of x."""
    block_n, block_k, k, size = config["BLOCK_N"], config["BLOCK_K"], G * group, DTYPE_BYTES[dtype]
    return LaunchCost(
        programs=cdiv(n, block_n) * cdiv(k, block_k),
        bytes=block_n * block_k * (1 + 2 * size) // 2,
        bytes_per_stage=block_n * block_k // 2,
        elementwise_ops=4 * block_n * block_k,
        library_flops=2 * m * n * k,
        library_bytes=(m * k + n * k + m * n) * size,
    )


SPACE = SearchSpace(
    {"BLOCK_N": [16, 32, 64], "BLOCK_K": [64, 128, 256], "num_warps": [2, 4, 8], "num_stages": [1]},
    is_valid=lambda config, **_: 512 <= config["BLOCK_N"] * config["BLOCK_K"] // config["num_warps"] <= 4096,
    launch_cost=launch_cost,
)


@triton.jit
def _int4_dequant_kernel(
    w,
    out_ptr,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ASM: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_N: tl.constexpr = BLOCK_N // 16
    TILES_K: tl.constexpr = BLOCK_K // 64
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid_n, pid_k = tl.program_id(0) // blocks_k, tl.program_id(0) % blocks_k
    start = pid_k * BLOCK_K
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    word_ptrs, top, low = block_pointers(w[0], pid_n, start, N, K, MASK_N, TILES_N, TILES_K)
    words = load_words(word_ptrs, start, K, TILES_K, MASK_K)
    group = load_group(w, top, low, start, N, K, GROUP_SIZE, ROUNDING, TILES_K)
    weights = dequantize_block(words, group, ROUNDING, DTYPE, ASM, False, TILES_N, TILES_K)
    offs_n = (pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_k = (start + tl.arange(0, BLOCK_K))[None, :]
    tl.store(out_ptr + offs_n * K + offs_k, weights, mask=(offs_n < N) & (offs_k < K))


@int4_matmul.impl("dequant", configs=CONFIGS, space=SPACE)
def int4_matmul_dequant(
    x: Tensor,
    w: Int4,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    BLOCK_N: int,
    BLOCK_K: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n]; raises Unsupported for dtypes, devices and groups it does not serve."""
    check_int4_call("int4_matmul", x, w)
    n, k = w.shape
    weight = torch.empty(n, k, dtype=x.dtype, device=x.device)
    if weight.numel():
        _int4_dequant_kernel[grid(weight, BLOCK_N, BLOCK_K)](
            contiguous_tensors(w),
            weight,
            n,
            k,
            GROUP_SIZE=w.group_size,
            ROUNDING=rounding_mode(w, scale_sums=False),
            ASM=target_flags()["ASM"],
            MASK_N=n % 16 != 0,
            MASK_K=k % BLOCK_K != 0,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return linear.reference(x, weight, bias, residual)
