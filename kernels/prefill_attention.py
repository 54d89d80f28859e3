"""softmax(q kᵀ · scale) v of a chunk of new tokens, causal, over the cached pages and then over the chunk itself.

One program takes BLOCK_M rows of one key/value head of one sequence; a row is a pair (query, query head of the group),
so all heads that share keys share their loads. It walks the cached tokens BLOCK_N at a time through the block table,
then the keys of the chunk up to its own last query, with an online softmax in base 2.

q [s, h, d], k and v [s, g, d], pages [p, l, g, d], any strides; head h of the h/g that share key/value head g is
row r % (h/g) of its group. Programs past the end of their sequence return at once, so the grid needs no lengths.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import prefill_attention
from vila_triton.space import Config, Launch, Space, power_of_two

from ._tile import LOG2_E, attend_block, attention_launch, block_of, check, normalise, page_rows, rows_of, start_rows

CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
]


def launch(config: Config, b: int, s: int, t: int, g: int, ratio: int, d: int, l: int, dtype: str) -> Launch:
    """A query of the chunk sees half of it on average."""
    return attention_launch(config, heads=b * g, rows=s * ratio, keys=t + s // 2 + 1, d=d, dtype=dtype)


SPACE = Space(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    where=lambda config, s, ratio, **_: config["BLOCK_M"] <= max(16, power_of_two(s * ratio)),
    launch=launch,
)


@triton.jit(do_not_specialize=["stride_tb"])  # changes with the longest sequence
def _prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    table_ptr,
    start_ptr,
    history_ptr,
    out_ptr,
    scale,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_ks,
    stride_kg,
    stride_kd,
    stride_vs,
    stride_vg,
    stride_vd,
    stride_kpp,
    stride_kpl,
    stride_kpg,
    stride_kpd,
    stride_vpp,
    stride_vpl,
    stride_vpg,
    stride_vpd,
    stride_tb,
    stride_tp,
    stride_os,
    stride_oh,
    stride_od,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tl.static_assert(BLOCK_D >= D and BLOCK_D >= 16, "one block covers the head")
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    sequence = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    first = tl.load(start_ptr + sequence).to(tl.int64)
    length = (tl.load(start_ptr + sequence + 1) - first).to(tl.int32)
    row = tl.program_id(0) * BLOCK_M
    if row >= length * RATIO:
        return
    history = tl.load(history_ptr + sequence)

    offs_m = row + tl.arange(0, BLOCK_M)
    query = offs_m // RATIO  # [BLOCK_M], counted within the chunk
    head = group * RATIO + offs_m % RATIO  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = query < length
    mask_d = offs_d < D
    mask_q = mask_m[:, None] & mask_d[None, :]
    rows = first + query  # [BLOCK_M] int64
    q = tl.load(
        q_ptr + rows[:, None] * stride_qs + head[:, None] * stride_qh + offs_d[None, :] * stride_qd,
        mask=mask_q,
        other=0,
    )  # [BLOCK_M, BLOCK_D]
    peak, total, acc = start_rows(BLOCK_M, BLOCK_D)

    table_ptr += sequence * stride_tb
    k_pages_ptr += group * stride_kpg
    v_pages_ptr += group * stride_vpg
    for n in range(0, history, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        known = tokens < history
        at_k = page_rows(table_ptr, tokens, known, stride_tp, stride_kpp, stride_kpl, PAGE)
        at_v = page_rows(table_ptr, tokens, known, stride_tp, stride_vpp, stride_vpl, PAGE)
        k = tl.load(
            k_pages_ptr + at_k[None, :] + offs_d[:, None] * stride_kpd, mask=mask_d[:, None] & known[None, :], other=0
        )  # [BLOCK_D, BLOCK_N]
        v = tl.load(
            v_pages_ptr + at_v[:, None] + offs_d[None, :] * stride_vpd, mask=known[:, None] & mask_d[None, :], other=0
        )  # [BLOCK_N, BLOCK_D]
        peak, total, acc = attend_block(q, k.to(q.dtype), v.to(q.dtype), known[None, :], scale, peak, total, acc)

    k_ptr += first * stride_ks + group * stride_kg
    v_ptr += first * stride_vs + group * stride_vg
    last = tl.minimum((row + BLOCK_M - 1) // RATIO + 1, length)  # keys the last query of the block sees
    for n in range(0, last, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        known = tokens < last
        at = tokens.to(tl.int64)
        k = tl.load(
            k_ptr + at[None, :] * stride_ks + offs_d[:, None] * stride_kd,
            mask=mask_d[:, None] & known[None, :],
            other=0,
        )  # [BLOCK_D, BLOCK_N]
        v = tl.load(
            v_ptr + at[:, None] * stride_vs + offs_d[None, :] * stride_vd,
            mask=known[:, None] & mask_d[None, :],
            other=0,
        )  # [BLOCK_N, BLOCK_D]
        visible = (tokens[None, :] <= query[:, None]) & known[None, :]
        peak, total, acc = attend_block(q, k, v, visible, scale, peak, total, acc)

    out_ptr += rows[:, None] * stride_os + head[:, None] * stride_oh + offs_d[None, :] * stride_od
    tl.store(out_ptr, normalise(acc, total).to(out_ptr.dtype.element_ty), mask=mask_q)


@prefill_attention.impl("triton", configs=CONFIGS, space=SPACE)
def prefill_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    history: Tensor,
    scale: float,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    check("prefill_attention", q, k, v, k_pages, v_pages)
    (s, h, d), g, b, l = q.shape, k.shape[1], len(history), k_pages.shape[1]
    out = torch.empty(s, h, d, dtype=q.dtype, device=q.device)
    BLOCK_M = rows_of(BLOCK_M, q)
    if out.numel():
        grid = (triton.cdiv(s * (h // g), BLOCK_M), g, b)
        _prefill_attention_kernel[grid](
            q,
            k,
            v,
            k_pages,
            v_pages,
            block_table,
            query_start.contiguous(),
            history.contiguous(),
            out,
            scale * LOG2_E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *k_pages.stride(),
            *v_pages.stride(),
            *block_table.stride(),
            *out.stride(),
            RATIO=h // g,
            D=d,
            PAGE=l,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_D=block_of(d),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out
