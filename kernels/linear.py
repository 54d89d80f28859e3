"""x · wᵀ + bias + residual in tiles: a program multiplies BLOCK_M rows of x by BLOCK_N of w, BLOCK_K inputs at a time.

The first config serves any number of rows in the same tiles, so that a row's sum runs over the same products in the
same order whatever other rows there are: this is batch-invariant, and runs on a GPU where that is asked for. Programs
that share rows of w are neighbours.

x [m, k], w [n, k], any strides; bias [n], residual [m, n]; sums in float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, linear
from vila_triton.registry import Unsupported
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._launch import check_supported, grid, rows_and_output, rows_for_dtype

CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
]


def launch_cost(config: Config, m: int, n: int, k: int, dtype: str, **_: object) -> LaunchCost:
    """Return the cost of multiplying x [m, k] by w [n, k]."""
    block_m, block_n, size = config["BLOCK_M"], config["BLOCK_N"], DTYPE_BYTES[dtype]
    k_steps = cdiv(k, config["BLOCK_K"])
    bytes_per_k = (min(block_m, m) + block_n) * size
    return LaunchCost(
        programs=cdiv(m, block_m) * cdiv(n, block_n),
        bytes=bytes_per_k * k + block_m * block_n * size,
        bytes_per_stage=bytes_per_k * config["BLOCK_K"],
        dot_flops=2 * block_m * block_n * k_steps * config["BLOCK_K"],
        elementwise_ops=4 * block_m * block_n,
    )


SPACE = SearchSpace(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [32, 64, 128, 256],
        "BLOCK_K": [32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    is_valid=lambda config, m, **_: config["BLOCK_M"] <= max(16, next_power_of_2(m)),
    launch_cost=launch_cost,
)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        mask_k = start + offs_k < K
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * stride_xk
        w_ptrs += tl.cast(BLOCK_K, tl.int64) * stride_wk
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[:, None] * N + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@linear.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def linear_triton(
    x: Tensor,
    w: Tensor | Int4,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    BLOCK_K: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n]; raises Unsupported unless x and w are of one dtype, which it serves."""
    if isinstance(w, Int4):  # which has an op of its own
        return linear.reference(x, w, bias, residual)
    check_supported("linear", x, w, *(() if bias is None else (bias,)))
    if w.dtype != x.dtype:
        raise Unsupported(f"linear: w is {w.dtype}, expected {x.dtype} like x")
    rows, out = rows_and_output(x, len(w))
    BLOCK_M, BLOCK_N = rows_for_dtype(BLOCK_M, x), rows_for_dtype(BLOCK_N, x)
    if out.numel():
        _linear_kernel[grid(out, BLOCK_M, BLOCK_N)](
            rows,
            w,
            None if bias is None else bias.contiguous(),
            None if residual is None else residual.contiguous(),
            out,
            len(rows),
            *w.shape,
            *rows.stride(),
            *w.stride(),
            out.stride(0),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out.view(*x.shape[:-1], len(w))
