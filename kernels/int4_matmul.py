"""x · wᵀ with w[i, j] = (code[i, j] - zeros[i, j // group]) · scales[i, j // group].

One program makes a BLOCK_M by BLOCK_N tile of the product and walks k in blocks that lie within one group, so a block
needs one scale and one zero per row of w. Each int32 word is loaded once and spread over its eight columns.

x [m, k], any strides; qweight [n, k/8] int32, nibble i (from the low end) of word c is column 8c + i; scales and zeros
[n, G]. The weight is rounded to x's dtype as `dequantize` does; the sum is kept in float32.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry import Unsupported
from vila_triton.space import SIZE, Config, Launch, Space, cdiv, power_of_two

from ._tile import check

CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
]


def worth_trying(config: Config, m: int, group: int, **_: object) -> bool:
    """A block of rows is not mostly padding, one of k lies in a group, and a thread sums 8 to 128 elements."""
    sums = config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"])
    return config["BLOCK_M"] <= max(16, power_of_two(m)) and config["BLOCK_K"] <= group & -group and 8 <= sums <= 128


def launch(config: Config, m: int, n: int, G: int, group: int, dtype: str) -> Launch:
    block_m, block_n, k, size = config["BLOCK_M"], config["BLOCK_N"], G * group, SIZE[dtype]
    columns = block_m * size + block_n // 2  # bytes of x and of the weight that a step of one k reads
    return Launch(
        programs=cdiv(m, block_m) * cdiv(n, block_n),
        bytes=k * columns + 2 * block_n * G * size + block_m * block_n * size,
        stage=config["BLOCK_K"] * columns,
        dots=2 * block_m * block_n * k,
        lanes=8 * block_n * k,  # to make a number of a code
    )


SPACE = Space(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [32, 64, 128, 256],
        "BLOCK_K": [32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    worth_trying,
    launch,
)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_matmul_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_qn,
    stride_qk,
    stride_sn,
    stride_sg,
    stride_zn,
    stride_zg,
    stride_om,
    stride_on,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tl.static_assert(GROUP % BLOCK_K == 0, "a block of k lies within one group, and so no block overruns k")
    tl.static_assert(BLOCK_K % 16 == 0, "a block of k is whole words, and tl.dot needs 16 columns")
    WORDS: tl.constexpr = BLOCK_K // 8
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_w = tl.arange(0, WORDS)
    mask_m = offs_m < M
    mask_n = offs_n < N
    shifts = tl.arange(0, 8) * 4

    # Rows past the end read row 0 and are not stored, which spares a mask in every load of the loop.
    rows_x = tl.where(mask_m, offs_m, 0)
    rows_w = tl.where(mask_n, offs_n, 0)
    x_ptr += rows_x[:, None] * stride_xm + offs_k[None, :] * stride_xk
    qweight_ptr += rows_w[None, :] * stride_qn + offs_w[:, None] * stride_qk
    scales_ptr += rows_w * stride_sn
    zeros_ptr += rows_w * stride_zn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr)  # [BLOCK_M, BLOCK_K]
        words = tl.load(qweight_ptr)  # [WORDS, BLOCK_N]
        codes = (words[:, None, :] >> shifts[None, :, None]) & 0xF  # [WORDS, 8, BLOCK_N]
        codes = tl.reshape(codes, [BLOCK_K, BLOCK_N]).to(x.dtype)
        i_g = k // GROUP
        scales = tl.load(scales_ptr + i_g * stride_sg).to(x.dtype)  # [BLOCK_N]
        zeros = tl.load(zeros_ptr + i_g * stride_zg).to(x.dtype)  # [BLOCK_N]
        w = (codes - zeros[None, :]) * scales[None, :]  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptr += BLOCK_K * stride_xk
        qweight_ptr += WORDS * stride_qk

    out_ptr += offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@int4_matmul.impl("triton", configs=CONFIGS, space=SPACE)
def int4_matmul_triton(
    x: Tensor, w: Int4, *, BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int
) -> Tensor:
    check("int4_matmul", x, w.scales, w.zeros)
    (n, k), group = w.shape, w.group
    block = min(BLOCK_K, group & -group)  # the largest power of two that divides the group, unless that is more
    if block < 16:
        raise Unsupported(f"int4_matmul: the group is {group}, but a block of k is at least 16 and lies in one group")
    rows = x.reshape(-1, k)  # [m, k]
    m = len(rows)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel():
        _int4_matmul_kernel[(triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N))](
            rows,
            w.qweight,
            w.scales,
            w.zeros,
            out,
            m,
            n,
            k,
            *rows.stride(),
            *w.qweight.stride(),
            *w.scales.stride(),
            *w.zeros.stride(),
            *out.stride(),
            GROUP=group,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out.view(*x.shape[:-1], n)
