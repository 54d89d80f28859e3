"""softmax(q kᵀ · scale) v of one new token per sequence over its cached pages, split along the keys.

One program takes all query heads of one KV head (padded to the 16 rows `tl.dot` needs) over one split of the
keys of one sequence, and walks it BLOCK_N tokens at a time with an online softmax in base 2; only the last tile of a
sequence needs a mask. What splits leave (sums in float32, not yet divided) the program that is done last merges in
order; `_split_kv` says how many there are, and of one alone the output is written at once. A program is one warp where
registers allow: its rows are fewer than two warps could share, who would wait for each other's parts of every softmax.
Pages in 8 or 4 bits are multiplied as codes: scales go to the scores and to the weights.

q [b, h, d], pages [p, l, g, d], any strides; token j of a sequence is row j % l of page block_table[sequence, j // l].
Under "batch_invariant" splits have a fixed length, and CONFIGS[0] is used whatever config is passed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import PagedKV, decode_attention
from vila_triton.ops.kv_pages import kv_bytes
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._heads import dot_layout, load_heads, store_heads, whole_layout
from ._kv_pages import attend_paged_tile, check_pages_supported, kv_bits, load_page_ids, page_tensors_and_strides
from ._last_arriver import arrival_counters, arrives_last, counting
from ._launch import LOG2_E, dot_block
from ._online_softmax import init_softmax, log_sum_exp, normalize
from ._split_kv import DEFAULT_NUM_SMS, keys_per_split, merge_splits, num_sms, plan_splits

CONFIGS = [
    {"BLOCK_N": 32, "PROGRAMS_PER_SM": 2, "num_warps": 1, "num_stages": 3},
    {"BLOCK_N": 64, "PROGRAMS_PER_SM": 2, "num_warps": 4, "num_stages": 3},
]


def launch_cost(
    config: Config, b: int, t: int, g: int, ratio: int, d: int, l: int, dtype: str, kv: str, numerics: str
) -> LaunchCost:
    """The cost of a launch; what splits leave counts as stored."""
    block_n, block_d = fit_tile(config, ratio, d, DTYPE_BYTES[dtype], kv != "plain")["BLOCK_N"], dot_block(d)
    split_plan = plan_splits(numerics, b * g, t, block_n, config["PROGRAMS_PER_SM"] * DEFAULT_NUM_SMS)
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
    {
        "BLOCK_N": [16, 32, 64, 128],
        "PROGRAMS_PER_SM": [1, 2, 4, 8],
        "num_warps": [1, 2, 4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    launch_cost=launch_cost,
)


def fit_tile(config: Config, ratio: int, d: int, itemsize: int, quantized: bool) -> dict[str, int]:
    """The tile of a config for heads of d numbers, `ratio` of which share a KV head, one that the registers hold:

    d above 128     half the keys, on two warps or more
    quantized       half the keys beyond 32, on two warps or more, and three stages at most
    float32         16 keys, one stage; four warps, which multiply on their lanes, two for quantized heads up to 64
    """
    num_warps = dot_block(ratio) // 16 * (2 if quantized or dot_block(d) > 128 else 1)
    if itemsize > 2:
        return {"BLOCK_N": 16, "num_warps": 2 if quantized and d <= 64 else 4, "num_stages": 1}
    block_n = config["BLOCK_N"]
    if quantized:  # codes take more registers than they took memory
        block_n = max(min(block_n, 32), block_n // 2)
    return {
        "BLOCK_N": max(16, block_n >> (dot_block(d) > 128)),
        "num_warps": max(config["num_warps"], num_warps),
        "num_stages": min(config["num_stages"], 3) if quantized else config["num_stages"],
    }


def splits_at_a_time(ratio: int, d: int, num_warps: int) -> int:
    """Splits that are loaded at once as they are merged: up to 8, of which a thread holds up to 64 numbers."""
    return max(1, min(8, 64 * 32 * num_warps // (next_power_of_2(ratio) * next_power_of_2(d))))


@triton.jit
def store_attention(out_ptr, stride_o, lse_ptr, sequence, head, num_heads, mask, state, HEAD: tl.constexpr):
    """Store what `state`, (m_i, l_i, acc) of the heads `head` [n] of a sequence, amounts to; lse_ptr may be None."""
    m_i, l_i, acc = state
    store_heads(out_ptr, sequence * stride_o[0] + head * stride_o[1], mask, stride_o[2], normalize(acc, l_i), HEAD)
    if lse_ptr is not None:
        tl.store(lse_ptr + sequence * num_heads + head, log_sum_exp(m_i, l_i), mask=mask)


@triton.jit(do_not_specialize=["num_splits", "max_splits", "stride_tb"])  # these change with the longest sequence
def _decode_attention_kernel(
    q_ptr,
    k_pages,
    v_pages,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    split_states,  # acc [b, g, max_splits, h/g, d], m_i and l_i [b, g, max_splits, 2, h/g], or None if that is one
    counters_ptr,  # [b, g]: how many splits have arrived
    scale,
    num_splits,
    max_splits,
    stride_q: tl.constexpr,  # known as it compiles: heads of 72 are whole 16-byte loads only if the compiler sees it
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    stride_tb,
    stride_tp,
    stride_o: tl.constexpr,
    G: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    MAX_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MERGED_HEAD: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= QUERIES_PER_KV and BLOCK_M >= 16, "one block covers the heads of a KV head")
    tl.static_assert(BLOCK_N >= 16 and MIN_KEYS % BLOCK_N == 0 and MAX_KEYS % BLOCK_N == 0, "splits are whole tiles")
    programs = tl.num_programs(0) // max_splits  # of each split
    split, program = tl.program_id(0) // programs, (tl.program_id(0) % programs).to(tl.int64)
    sequence, kv_head = program // G, program % G
    seq_len = tl.load(seq_lens_ptr + sequence)
    keys = keys_per_split(seq_len, num_splits, MIN_KEYS, MAX_KEYS)
    count = tl.maximum(tl.cdiv(seq_len, keys), 1)  # an empty sequence is a split of no keys
    if split >= count:
        return
    begin = split * keys
    end = tl.minimum(begin + keys, seq_len)

    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < QUERIES_PER_KV
    head = kv_head * QUERIES_PER_KV + rows  # [BLOCK_M] int64
    q = load_heads(q_ptr, sequence * stride_q[0] + head * stride_q[1], row_mask, stride_q[2], HEAD)
    m_i, l_i, acc = init_softmax(BLOCK_M, HEAD)
    block_table_ptr += sequence * stride_tb
    full_end = tl.maximum(begin, end // BLOCK_N * BLOCK_N)
    pages = load_page_ids(block_table_ptr, stride_tp, begin, end, PAGE_SIZE, BLOCK_N)
    for n in range(begin, full_end, BLOCK_N):
        next_pages = load_page_ids(block_table_ptr, stride_tp, n + BLOCK_N, end, PAGE_SIZE, BLOCK_N)  # or keys wait
        tokens = n + tl.arange(0, BLOCK_N)
        m_i, l_i, acc = attend_paged_tile(
            q, k_pages, stride_k, v_pages, stride_v, pages, tokens, None, kv_head, scale, m_i, l_i, acc, HEAD, PAGE_SIZE
        )
        pages = next_pages
    for n in tl.range(full_end, end, BLOCK_N, num_stages=1):  # one tile at most
        tokens = n + tl.arange(0, BLOCK_N)
        mask = tokens < end
        m_i, l_i, acc = attend_paged_tile(
            q, k_pages, stride_k, v_pages, stride_v, pages, tokens, mask, kv_head, scale, m_i, l_i, acc, HEAD, PAGE_SIZE
        )

    if split_states is None or count == 1:
        store_attention(out_ptr, stride_o, lse_ptr, sequence, head, G * QUERIES_PER_KV, row_mask, (m_i, l_i, acc), HEAD)
    else:
        first = program * max_splits
        offsets = (first + split) * QUERIES_PER_KV + rows
        store_heads(split_states[0], offsets * HEAD.D, row_mask, 1, acc, HEAD)
        sums_ptrs = split_states[1] + (first + split) * 2 * QUERIES_PER_KV + rows
        tl.store(sums_ptrs, m_i, mask=row_mask)
        tl.store(sums_ptrs + QUERIES_PER_KV, l_i, mask=row_mask)
        if arrives_last(counters_ptr + program, count):
            merged_rows = tl.arange(0, MERGED_ROWS)
            mask, heads = merged_rows < QUERIES_PER_KV, kv_head * QUERIES_PER_KV + merged_rows
            merged = merge_splits(split_states, first, count, mask, QUERIES_PER_KV, MERGED_HEAD, MERGED_SPLITS)
            store_attention(out_ptr, stride_o, lse_ptr, sequence, heads, G * QUERIES_PER_KV, mask, merged, MERGED_HEAD)


@decode_attention.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def decode_attention_triton(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
    *,
    BLOCK_N: int,
    PROGRAMS_PER_SM: int,
    num_warps: int,
    num_stages: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention [b, h, d] in q's dtype, and with `return_lse` its log-sum-exp [b, h] in float32.

    Raises Unsupported for dtypes, devices and pages that the kernel does not serve.
    """
    check_pages_supported("decode_attention", q, cache.k_pages, cache.v_pages)
    (b, h, d), (_, page_size, g, _) = q.shape, cache.k_pages.shape
    config = {"BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    quantized = not isinstance(cache.k_pages, Tensor)
    tile = fit_tile(CONFIGS[0] if numerics == "batch_invariant" else config, h // g, d, q.element_size(), quantized)
    out = torch.empty(b, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel():
        capacity = cache.block_table.shape[1] * page_size
        split_plan = plan_splits(numerics, b * g, capacity, tile["BLOCK_N"], PROGRAMS_PER_SM * num_sms(q.device))
        split_states, counters, seq_lens = None, None, seq_lens.contiguous()
        if split_plan.max_splits > 1:
            rows = b * g * split_plan.max_splits, h // g
            acc = torch.empty(*rows, d, dtype=torch.float32, device=q.device)
            sums = torch.empty(rows[0], 2, rows[1], dtype=torch.float32, device=q.device)
            split_states, counters = (acc, sums), arrival_counters(q.device, b * g)
        (k_pages, stride_k), (v_pages, stride_v) = map(page_tensors_and_strides, (cache.k_pages, cache.v_pages))
        with counting(q.device):
            _decode_attention_kernel[(b * g * split_plan.max_splits,)](
                q,
                k_pages,
                v_pages,
                cache.block_table,
                seq_lens,
                out,
                lse,
                split_states,
                counters,
                softmax_scale * LOG2_E,
                split_plan.num_splits,
                split_plan.max_splits,
                q.stride(),
                stride_k,
                stride_v,
                *cache.block_table.stride(),
                out.stride(),
                G=g,
                QUERIES_PER_KV=h // g,
                PAGE_SIZE=page_size,
                HEAD=dot_layout(d, kv_bits(cache.k_pages), single_block=True),
                MIN_KEYS=split_plan.min_keys,
                MAX_KEYS=split_plan.max_keys,
                BLOCK_M=dot_block(h // g),
                MERGED_ROWS=next_power_of_2(h // g),
                MERGED_HEAD=whole_layout(d),
                MERGED_SPLITS=splits_at_a_time(h // g, d, tile["num_warps"]),
                **tile,
            )
    return out if lse is None else (out, lse)
