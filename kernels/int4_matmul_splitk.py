"""x · wᵀ + bias + residual for up to 64 rows of x: k is split among programs, so that few tiles of w still fill a GPU.

A program multiplies BLOCK_N rows of w by BLOCK_M rows of x over one split of k. w is the left operand of `tl.dot`, so
that codes become numbers in the registers that the tensor cores read, which take 8 rows of x or more. With SPLIT_K > 1
the program of a tile that arrives last adds up the sums of all, in the order of the splits, so that the result has the
same bits every time.

Scales multiply sums, as code - zero is exact, so no weight is rounded. They multiply weights in blocks of 64 rows,
where scaling sums would need a second accumulator, in groups of 32, and with the rounding "fma".

x [m, k], any strides; sums are float32; a row of x does not change the result of another.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry.search_space import SearchSpace

from ._int4_decode import int4_decode_tile
from ._int4_gemm import is_promising, launch_cost
from ._int4_launch import check_int4_call, fit_block_k, matmul_args, rounding_mode, target_flags
from ._last_arriver import counting
from ._launch import grid, rows_and_output
from ._splitk_reduce import partial_sums, reduce_and_store, split_k

CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128, "SPLIT_K": 8, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 8, "BLOCK_N": 128, "BLOCK_K": 128, "SPLIT_K": 16, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 128, "SPLIT_K": 4, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT_K": 2, "num_warps": 4, "num_stages": 2},
]
BY_TARGET = {
    target: [[8, 1], [16, 0], 2] for target in ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
}
SPACE = SearchSpace(
    {
        "BLOCK_M": [8, 16, 32, 64],
        "BLOCK_N": [64, 128, 256],
        "BLOCK_K": [64, 128],
        "SPLIT_K": [1, 2, 4, 8, 16],
        "num_warps": [1, 2, 4, 8],
        "num_stages": [2],
    },
    is_promising,
    launch_cost,
)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_splitk_kernel(
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
    OPAQUE: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = block // blocks_n, block % blocks_n
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # int64 if N is
    begin = split * K_PER_SPLIT
    end = tl.minimum(begin + K_PER_SPLIT, K)
    acc = int4_decode_tile(
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
        GROUP_SIZE,
        ROUNDING,
        ASM,
        OPAQUE,
        MASK_N,
        MASK_K,
        BLOCK_N,
        BLOCK_K,
    )
    offs_m, offs_n = offs_m[None, :], offs_n[:, None]
    reduce_and_store(acc, offs_m, offs_n, block, split, parts, bias_ptr, residual_ptr, out_ptr, M, N, stride_om, SPLITS)


@int4_matmul.impl("splitk", configs=CONFIGS, by_target=BY_TARGET, space=SPACE, batch_invariant=True)
def int4_matmul_splitk(
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
    block_k = fit_block_k(BLOCK_K, w)
    if out.numel():
        k_per_split, splits = split_k(w.shape[1], block_k, SPLIT_K)
        (blocks,) = grid(out, BLOCK_M, BLOCK_N)
        with counting(x.device):
            _int4_matmul_splitk_kernel[blocks, splits](
                *matmul_args(rows, w, bias, residual, out),
                partial_sums(out, splits, blocks),
                k_per_split,
                SPLITS=splits,
                GROUP_SIZE=w.group_size,
                ROUNDING=rounding_mode(w, scale_sums=BLOCK_M < 64),
                **target_flags(BLOCK_M, num_warps),
                MASK_N=w.shape[0] % 16 != 0,
                MASK_K=w.shape[1] % block_k != 0,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=block_k,
                num_warps=num_warps,
                num_stages=num_stages,
            )
    return out.view(*x.shape[:-1], w.shape[0])
