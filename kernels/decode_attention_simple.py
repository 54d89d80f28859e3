"""softmax(q kᵀ · scale) v of one new token per sequence over its cached pages.

The readable rung: one program takes all query heads of one key/value head of one sequence (padded to the 16 rows
`tl.dot` needs), so each cached key and value is read once. It walks the cached tokens BLOCK_N at a time with an online
softmax in base 2, from the first to the last, which is "invariant" as it is but for the config: that is the first one.

q [b, h, d], pages [p, l, g, d], any strides; token j of a sequence is row j % l of page block_table[sequence, j // l].
Strides are compile-time constants: heads of 72 are whole 16-byte loads only if the compiler sees it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, decode_attention
from vila_triton.registry import Unsupported
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace

from ._launch import (
    LOG2_E,
    attend_simple_tile,
    attention_launch_cost,
    cast_operand,
    check_supported,
    dot_block,
    init_simple_softmax,
    normalize,
    page_offsets,
    stages_for_dtype,
)

CONFIGS = [
    {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_N": 16, "num_warps": 2, "num_stages": 3},
]


def launch_cost(config: Config, b: int, t: int, g: int, ratio: int, d: int, dtype: str, **_) -> LaunchCost:
    return attention_launch_cost(config, heads=b * g, rows=ratio, keys=t, d=d, dtype=dtype)


SPACE = SearchSpace(
    {"BLOCK_N": [16, 32, 64, 128], "num_warps": [1, 2, 4, 8], "num_stages": [1, 2, 3, 4, 5]},
    launch_cost=launch_cost,
)


@triton.jit(do_not_specialize=["stride_tb"])  # changes with the longest sequence
def _decode_attention_simple_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    table_ptr,
    length_ptr,
    out_ptr,
    scale,
    stride_q: tl.constexpr,  # of b, h and d
    stride_k: tl.constexpr,  # of p, l, g and d
    stride_v: tl.constexpr,
    stride_tb,
    stride_tp,
    stride_o: tl.constexpr,
    G: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tl.static_assert(BLOCK_D >= D and BLOCK_D >= 16, "one block covers the head")
    tl.static_assert(BLOCK_M >= RATIO and BLOCK_M >= 16, "one block covers the heads of a group")
    tl.static_assert(BLOCK_N >= 16, "tl.dot needs 16 columns")
    sequence = (tl.program_id(0) // G).to(tl.int64)
    group = (tl.program_id(0) % G).to(tl.int64)
    length = tl.load(length_ptr + sequence)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    head = group * RATIO + offs_m  # [BLOCK_M]
    mask_d = offs_d < D
    mask_q = (offs_m < RATIO)[:, None] & mask_d[None, :]
    q_ptr += sequence * stride_q[0]
    q = tl.load(q_ptr + head[:, None] * stride_q[1] + offs_d[None, :] * stride_q[2], mask=mask_q, other=0)  # [M, D]
    peak, total, acc = init_simple_softmax(BLOCK_M, BLOCK_D)

    table_ptr += sequence * stride_tb
    k_pages_ptr += group * stride_k[2]
    v_pages_ptr += group * stride_v[2]
    for n in range(0, length, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        known = tokens < length
        at_k = page_offsets(table_ptr, tokens, known, stride_tp, stride_k[0], stride_k[1], PAGE)
        at_v = page_offsets(table_ptr, tokens, known, stride_tp, stride_v[0], stride_v[1], PAGE)
        k = tl.load(
            k_pages_ptr + at_k[None, :] + offs_d[:, None] * stride_k[3], mask=mask_d[:, None] & known[None, :], other=0
        )  # [BLOCK_D, BLOCK_N]
        v = tl.load(
            v_pages_ptr + at_v[:, None] + offs_d[None, :] * stride_v[3], mask=known[:, None] & mask_d[None, :], other=0
        )  # [BLOCK_N, BLOCK_D]
        peak, total, acc = attend_simple_tile(
            q, cast_operand(k, q.dtype), cast_operand(v, q.dtype), known[None, :], scale, peak, total, acc
        )

    out_ptr += sequence * stride_o[0] + head[:, None] * stride_o[1] + offs_d[None, :] * stride_o[2]
    tl.store(out_ptr, normalize(acc, total).to(out_ptr.dtype.element_ty), mask=mask_q)


@decode_attention.impl("simple", configs=CONFIGS, space=SPACE, batch_invariant=True)
def decode_attention_simple(
    q: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
    *,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    if return_lse or not isinstance(k_pages, Tensor) or not isinstance(v_pages, Tensor):
        raise Unsupported("decode_attention: the simple kernel has no log-sum-exp and reads no quantised pages")
    check_supported("decode_attention", q, k_pages, v_pages)
    config = {"BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    config = CONFIGS[0] if numerics == "invariant" else config
    config = {**config, "num_stages": stages_for_dtype(config["num_stages"], q)}
    (b, h, d), (_, l, g, _) = q.shape, k_pages.shape
    out = torch.empty(b, h, d, dtype=q.dtype, device=q.device)
    if out.numel():
        _decode_attention_simple_kernel[(b * g,)](
            q,
            k_pages,
            v_pages,
            block_table,
            seq_lens.contiguous(),
            out,
            softmax_scale * LOG2_E,
            q.stride(),
            k_pages.stride(),
            v_pages.stride(),
            *block_table.stride(),
            out.stride(),
            G=g,
            RATIO=h // g,
            D=d,
            PAGE=l,
            BLOCK_M=dot_block(h // g),
            BLOCK_D=dot_block(d),
            **config,
        )
    return out
