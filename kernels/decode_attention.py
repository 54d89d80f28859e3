"""softmax(q kᵀ · scale) v of one new token per sequence over its cached pages, split along the keys.

One program takes all query heads of one key/value head (padded to the 16 rows `tl.dot` needs) over one split of the
keys of one sequence, and walks it BLOCK_N tokens at a time with an online softmax in base 2; only the last tile of a
sequence needs a mask. What splits leave (sums in float32, not yet divided) a second kernel merges in order; `_split`
says how many there are, and where there can be but one, it is written at once. Pages in 8 or 4 bits are multiplied as
codes: scales go to the scores and to the weights.

q [b, h, d], pages [p, l, g, d], any strides; token j of a sequence is row j % l of page block_table[sequence, j // l].
Under "invariant" splits have a fixed length and the config is the first, whatever it is asked to be.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, decode_attention
from vila_triton.ops.kv_write import kv_bytes
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv

from ._kv_pages import (
    attend_paged_tile,
    check_pages_supported,
    head_constants,
    load_heads,
    load_page_ids,
    page_tensors_and_strides,
    store_heads,
)
from ._launch import LOG2_E, dot_block, stages_for_dtype
from ._online_softmax import divide_heads, init_softmax
from ._split_kv import DEFAULT_NUM_SMS, keys_per_split, lse_or_minus_inf, merge_splits_kernel, num_sms, plan_splits

CONFIGS = [
    {"BLOCK_N": 64, "PLACES": 2, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 32, "PLACES": 4, "num_warps": 4, "num_stages": 4},
]


def launch_cost(
    config: Config, b: int, t: int, g: int, ratio: int, d: int, l: int, dtype: str, kv: str, numerics: str
) -> LaunchCost:
    """The first kernel; the sums it leaves count as stored."""
    block_n, block_d = keys_per_tile(config["BLOCK_N"], d, DTYPE_BYTES[dtype], kv != "plain"), dot_block(d)
    split_plan = plan_splits(numerics, b * g, t, block_n, config["PLACES"] * DEFAULT_NUM_SMS)
    keys = cdiv(t, split_plan.max_splits)
    padded_keys = block_n * cdiv(keys, block_n)
    return LaunchCost(
        programs=b * g * split_plan.max_splits,
        bytes=2 * kv_bytes(keys, d, dtype, kv) + ratio * d * (DTYPE_BYTES[dtype] + 4),
        bytes_per_stage=2 * kv_bytes(block_n, d, dtype, kv),
        dot_flops=4 * dot_block(ratio) * block_d * padded_keys,
        elementwise_ops=8 * dot_block(ratio) * padded_keys + (0 if kv == "plain" else 6 * block_d * padded_keys),
    )


SPACE = SearchSpace(
    {"BLOCK_N": [16, 32, 64, 128], "PLACES": [1, 2, 4, 8], "num_warps": [1, 2, 4, 8], "num_stages": [1, 2, 3, 4, 5]},
    launch_cost=launch_cost,
)


def keys_per_tile(block_n: int, d: int, itemsize: int, quantized: bool) -> int:
    """Keys of a tile: half of those asked for where heads are wider than 128, where numbers have 4 bytes, and, if they
    are more than 32, where pages are quantised, whose codes take more registers than they took memory.
    """
    block_n = max(min(block_n, 32), block_n // 2) if quantized else block_n
    return max(16, block_n >> (dot_block(d) > 128) + (itemsize > 2))


@triton.jit(do_not_specialize=["wanted", "splits", "stride_tb"])  # these change with the longest sequence
def _decode_attention_kernel(
    q_ptr,
    k_pool,
    v_pool,
    table_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    parts,  # acc, peak and total of the splits, or None if each sequence is one
    scale,
    wanted,
    splits,
    stride_q: tl.constexpr,  # known as it compiles: heads of 72 are whole 16-byte loads only if the compiler sees it
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    stride_tb,
    stride_tp,
    stride_o: tl.constexpr,
    G: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= RATIO and BLOCK_M >= 16, "one block covers the heads of a group")
    tl.static_assert(FIRST >= WIDTH and WIDTH + REST >= D and FIRST >= 16, "the blocks cover the head")
    tl.static_assert(BLOCK_N >= 16 and LEAST % BLOCK_N == 0 and MOST % BLOCK_N == 0, "splits are whole tiles")
    programs = tl.num_programs(0) // splits  # of each split
    split, program = tl.program_id(0) // programs, (tl.program_id(0) % programs).to(tl.int64)
    sequence, group = program // G, program % G
    length = tl.load(length_ptr + sequence)
    keys = keys_per_split(length, wanted, LEAST, MOST)
    begin = split * keys
    if parts is not None and begin >= length:
        return
    end = tl.minimum(begin + keys, length)

    rows = tl.arange(0, BLOCK_M)
    mine = rows < RATIO
    head = group * RATIO + rows  # [BLOCK_M] int64
    at = sequence * stride_q[0] + head * stride_q[1]
    q = load_heads(q_ptr, at, mine, stride_q[2], D, WIDTH, FIRST, REST)
    peak, total, acc = init_softmax(BLOCK_M, FIRST, REST)
    table_ptr += sequence * stride_tb
    full = tl.maximum(begin, end // BLOCK_N * BLOCK_N)
    page = load_page_ids(table_ptr, stride_tp, begin, end, PAGE, BLOCK_N)
    for n in range(begin, full, BLOCK_N):
        ahead = load_page_ids(
            table_ptr, stride_tp, n + BLOCK_N, end, PAGE, BLOCK_N
        )  # a tile early, or keys wait for it
        peak, total, acc = attend_paged_tile(
            q, k_pool, stride_k, v_pool, stride_v, page, n, None, group, scale, peak, total, acc,
            D, PAGE, BITS, WIDTH, FIRST, REST, BLOCK_N
        )  # fmt: skip
        page = ahead
    for n in tl.range(full, end, BLOCK_N, num_stages=1):  # one tile at most
        known = n + tl.arange(0, BLOCK_N) < end
        peak, total, acc = attend_paged_tile(
            q, k_pool, stride_k, v_pool, stride_v, page, n, known, group, scale, peak, total, acc,
            D, PAGE, BITS, WIDTH, FIRST, REST, BLOCK_N
        )  # fmt: skip

    heads = sequence * (G * RATIO) + head
    if parts is None:
        at = sequence * stride_o[0] + head * stride_o[1]
        store_heads(out_ptr, at, mine, stride_o[2], divide_heads(acc, tl.where(total == 0.0, 1.0, total)), D, WIDTH)
        if lse_ptr is not None:
            tl.store(lse_ptr + heads, lse_or_minus_inf(peak, total), mask=mine)
    else:
        at = heads * splits + split
        store_heads(parts[0], at * D, mine, 1, acc, D, WIDTH)
        tl.store(parts[1] + at, peak, mask=mine)
        tl.store(parts[2] + at, total, mask=mine)


@decode_attention.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def decode_attention_triton(
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
    PLACES: int,
    num_warps: int,
    num_stages: int,
) -> Tensor | tuple[Tensor, Tensor]:
    check_pages_supported("decode_attention", q, k_pages, v_pages)
    if numerics == "invariant":
        BLOCK_N, num_warps, num_stages = (CONFIGS[0][name] for name in ("BLOCK_N", "num_warps", "num_stages"))
    quantized = not isinstance(k_pages, Tensor)
    BLOCK_N = keys_per_tile(BLOCK_N, q.shape[-1], q.element_size(), quantized)
    num_stages = stages_for_dtype(
        min(num_stages, 3) if quantized else num_stages, q
    )  # four make ptxas spill: see bench.compile_sweep
    (b, h, d), (_, l, g, _), capacity = q.shape, k_pages.shape, block_table.shape[1] * k_pages.shape[1]
    out = torch.empty(b, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel():
        split_plan = plan_splits(numerics, b * g, capacity, BLOCK_N, PLACES * num_sms(q.device))
        split_states, seq_lens = None, seq_lens.contiguous()
        if split_plan.max_splits > 1:
            acc = torch.empty(b, h, split_plan.max_splits, d, dtype=torch.float32, device=q.device)
            m_i, l_i = (
                torch.empty(b, h, split_plan.max_splits, dtype=torch.float32, device=q.device) for _ in range(2)
            )
            split_states = (acc, m_i, l_i)
        (k_pool, stride_k), (v_pool, stride_v) = page_tensors_and_strides(k_pages), page_tensors_and_strides(v_pages)
        _decode_attention_kernel[(b * g * split_plan.max_splits,)](
            q,
            k_pool,
            v_pool,
            block_table,
            seq_lens,
            out,
            lse,
            split_states,
            softmax_scale * LOG2_E,
            split_plan.num_splits,
            split_plan.max_splits,
            q.stride(),
            stride_k,
            stride_v,
            *block_table.stride(),
            out.stride(),
            G=g,
            RATIO=h // g,
            D=d,
            PAGE=l,
            **head_constants(d, k_pages, single_block=True),
            LEAST=split_plan.min_keys,
            MOST=split_plan.max_keys,
            BLOCK_M=dot_block(h // g),
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        if split_states:
            merge_splits_kernel[(b * h,)](
                *split_states,
                seq_lens,
                out,
                lse,
                split_plan.num_splits,
                split_plan.max_splits,
                out.stride(),
                H=h,
                D=d,
                LEAST=split_plan.min_keys,
                MOST=split_plan.max_keys,
                BLOCK_S=16,
                BLOCK_D=triton.next_power_of_2(d),
                num_warps=4,
            )
    return out if lse is None else (out, lse)
