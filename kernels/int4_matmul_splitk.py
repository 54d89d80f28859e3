"""x · wᵀ + bias for 5 to 64 rows of x: k is split among programs, so that few tiles of w still fill the GPU.

A program multiplies BLOCK_N rows of w by BLOCK_M rows of x over its share of k, w being the left operand of `tl.dot`:
codes become numbers in the very registers the tensor cores read. With SPLIT_K = 1 it writes the result; else float32
parts [SPLIT_K, m, n], which a second kernel adds up in the order of the splits: the same bits every time.

Scales multiply sums, code - zero being exact, so no weight is rounded; in blocks of 64 rows, which would need a second
accumulator for that, in groups of 32, and in the order "fma", they multiply weights.

x [m, k], any strides; sums are float32; a row of x does not change the result of another.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry.search_space import SearchSpace

from ._int4_dequant import check_group_size, contiguous_tensors, fit_block_k, rounding_mode, target_flags
from ._int4_gemm import int4_gemm_tile, is_promising, launch_cost
from ._launch import check_supported
from ._splitk_reduce import reduce_splits

CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT_K": 4, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT_K": 8, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT_K": 4, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT_K": 2, "num_warps": 4, "num_stages": 2},
]
SPACE = SearchSpace(
    {
        "BLOCK_M": [16, 32, 64],
        "BLOCK_N": [64, 128, 256],
        "BLOCK_K": [64, 128],
        "SPLIT_K": [1, 2, 4, 8, 16],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    is_promising,
    launch_cost,
)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_splitk_kernel(
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
    HIDE: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * SHARE
    acc = int4_gemm_tile(
        x_ptr,
        qweight_ptr,
        scales_ptr,
        zeros_ptr,
        pid_n,
        offs_m,
        begin,
        tl.minimum(begin + SHARE, K),
        M,
        N,
        K,
        stride_xm,
        stride_xk,
        GROUP,
        ORDER,
        ASM,
        HIDE,
        MASK_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    out_ptr += tl.program_id(1).to(tl.int64) * stride_os + offs_m[None, :] * stride_om + offs_n[:, None]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@int4_matmul.impl("splitk", configs=CONFIGS, space=SPACE, batch_invariant=True)
def int4_matmul_splitk(
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
    m, block = len(rows), fit_block_k(BLOCK_K, w)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel():
        qweight, scales, zeros = contiguous_tensors(w)
        k_per_split = triton.cdiv(triton.cdiv(k, block), SPLIT_K) * block
        splits = triton.cdiv(k, k_per_split)  # at most SPLIT_K, and none of them empty
        partial_sums = out[None] if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
        _int4_matmul_splitk_kernel[(triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N), splits)](
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
            ORDER=rounding_mode(w, scale_sums=BLOCK_M < 64),
            **target_flags(),
            MASK_K=k % block != 0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        if splits > 1:
            reduce_splits(partial_sums, bias, out)
    return out.view(*x.shape[:-1], n)
