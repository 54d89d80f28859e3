"""softmax(q kᵀ · scale) v of every position of a picture over every position of it.

One program takes BLOCK_M queries of one head of one picture and walks all keys BLOCK_N at a time with an online
softmax in base 2. A head dim that is no power of two is padded to the next one with zeros.

q, k, v and out [b, s, h, d], any strides.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import encoder_attention
from vila_triton.space import Config, Launch, Space, power_of_two

from ._tile import LOG2_E, attend_block, attention_launch, block_of, check, normalise, rows_of, start_rows

CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
]


def launch(config: Config, b: int, s: int, h: int, d: int, dtype: str) -> Launch:
    return attention_launch(config, heads=b * h, rows=s, keys=s, d=d, dtype=dtype)


SPACE = Space(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    where=lambda config, s, **_: max(config["BLOCK_M"], config["BLOCK_N"]) <= max(16, power_of_two(s)),
    launch=launch,
)


@triton.jit
def _encoder_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    scale,
    S,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tl.static_assert(BLOCK_D >= D and BLOCK_D >= 16, "one block covers the head")
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    head = tl.program_id(1).to(tl.int64)
    picture = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask_q = (offs_m < S)[:, None] & mask_d[None, :]
    q_ptr += picture * stride_qb + head * stride_qh
    k_ptr += picture * stride_kb + head * stride_kh
    v_ptr += picture * stride_vb + head * stride_vh
    q = tl.load(q_ptr + offs_m[:, None] * stride_qs + offs_d[None, :] * stride_qd, mask=mask_q, other=0)  # [M, D]
    peak, total, acc = start_rows(BLOCK_M, BLOCK_D)

    for n in range(0, S, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N).to(tl.int64)
        known = tokens < S
        k = tl.load(
            k_ptr + tokens[None, :] * stride_ks + offs_d[:, None] * stride_kd,
            mask=mask_d[:, None] & known[None, :],
            other=0,
        )  # [BLOCK_D, BLOCK_N]
        v = tl.load(
            v_ptr + tokens[:, None] * stride_vs + offs_d[None, :] * stride_vd,
            mask=known[:, None] & mask_d[None, :],
            other=0,
        )  # [BLOCK_N, BLOCK_D]
        peak, total, acc = attend_block(q, k, v, known[None, :], scale, peak, total, acc)

    out_ptr += picture * stride_ob + head * stride_oh + offs_m[:, None] * stride_os + offs_d[None, :] * stride_od
    tl.store(out_ptr, normalise(acc, total).to(out_ptr.dtype.element_ty), mask=mask_q)


@encoder_attention.impl("triton", configs=CONFIGS, space=SPACE)
def encoder_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, BLOCK_M: int, BLOCK_N: int, num_warps: int, num_stages: int
) -> Tensor:
    check("encoder_attention", q, k, v)
    b, s, h, d = q.shape
    out = torch.empty(b, s, h, d, dtype=q.dtype, device=q.device)
    BLOCK_M = rows_of(BLOCK_M, q)
    if out.numel():
        _encoder_attention_kernel[(triton.cdiv(s, BLOCK_M), h, b)](
            q,
            k,
            v,
            out,
            scale * LOG2_E,
            s,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            D=d,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_D=block_of(d),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out
