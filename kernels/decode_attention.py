"""softmax(q kᵀ · scale) v of one new token per sequence over its cached pages, split along the keys.

One program takes all query heads of one KV head (padded to the 16 rows `tl.dot` needs) over one split of the
keys of one sequence, and walks it BLOCK_N tokens at a time with an online softmax in base 2; only the last tile of a
sequence needs a mask. What splits leave (sums in float32, not yet divided) a second kernel merges in order; `_split_kv`
says how many there are, and where there can be but one, it is written at once. Pages in 8 or 4 bits are multiplied as
codes: scales go to the scores and to the weights.

q [b, h, d], pages [p, l, g, d], any strides; token j of a sequence is row j % l of page block_table[sequence, j // l].
Under "batch_invariant" splits have a fixed length, and CONFIGS[0] is used whatever config is passed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import PagedKV, decode_attention
from vila_triton.ops.kv_pages import kv_bytes
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv

from ._heads import dot_layout, load_heads, store_heads
from ._kv_pages import attend_paged_tile, check_pages_supported, kv_bits, load_page_ids, page_tensors_and_strides
from ._launch import LOG2_E, dot_block, stages_for_dtype
from ._online_softmax import init_softmax, log_sum_exp, normalize
from ._split_kv import DEFAULT_NUM_SMS, keys_per_split, merge_splits_kernel, num_sms, plan_splits

CONFIGS = [
    {"BLOCK_N": 64, "PROGRAMS_PER_SM": 2, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 32, "PROGRAMS_PER_SM": 4, "num_warps": 4, "num_stages": 4},
]


def launch_cost(
    config: Config, b: int, t: int, g: int, ratio: int, d: int, l: int, dtype: str, kv: str, numerics: str
) -> LaunchCost:
    """The cost of the first kernel; the split states count as stored."""
    block_n, block_d = keys_per_tile(config["BLOCK_N"], d, DTYPE_BYTES[dtype], kv != "plain"), dot_block(d)
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


def keys_per_tile(block_n: int, d: int, itemsize: int, quantized: bool) -> int:
    """Keys of a tile: BLOCK_N, halved for heads wider than 128, for dtypes of 4 bytes and for quantized pages.

    The codes of quantized pages take more registers than they took memory; tiles of up to 32 keys are kept.
    """
    block_n = max(min(block_n, 32), block_n // 2) if quantized else block_n
    return max(16, block_n >> (dot_block(d) > 128) + (itemsize > 2))


@triton.jit(do_not_specialize=["num_splits", "max_splits", "stride_tb"])  # these change with the longest sequence
def _decode_attention_kernel(
    q_ptr,
    k_pages,
    v_pages,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    split_states,  # acc, m_i and l_i of the splits, or None if each sequence is one
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
):
    tl.static_assert(BLOCK_M >= QUERIES_PER_KV and BLOCK_M >= 16, "one block covers the heads of a KV head")
    tl.static_assert(BLOCK_N >= 16 and MIN_KEYS % BLOCK_N == 0 and MAX_KEYS % BLOCK_N == 0, "splits are whole tiles")
    programs = tl.num_programs(0) // max_splits  # of each split
    split, program = tl.program_id(0) // programs, (tl.program_id(0) % programs).to(tl.int64)
    sequence, kv_head = program // G, program % G
    seq_len = tl.load(seq_lens_ptr + sequence)
    keys = keys_per_split(seq_len, num_splits, MIN_KEYS, MAX_KEYS)
    begin = split * keys
    if split_states is not None and begin >= seq_len:
        return
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

    heads = sequence * (G * QUERIES_PER_KV) + head
    if split_states is None:
        offsets = sequence * stride_o[0] + head * stride_o[1]
        store_heads(out_ptr, offsets, row_mask, stride_o[2], normalize(acc, l_i), HEAD)
        if lse_ptr is not None:
            tl.store(lse_ptr + heads, log_sum_exp(m_i, l_i), mask=row_mask)
    else:
        offsets = heads * max_splits + split
        store_heads(split_states[0], offsets * HEAD.D, row_mask, 1, acc, HEAD)
        tl.store(split_states[1] + offsets, m_i, mask=row_mask)
        tl.store(split_states[2] + offsets, l_i, mask=row_mask)


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
    if numerics == "batch_invariant":
        BLOCK_N, num_warps, num_stages = (CONFIGS[0][name] for name in ("BLOCK_N", "num_warps", "num_stages"))
    quantized = not isinstance(cache.k_pages, Tensor)
    BLOCK_N = keys_per_tile(BLOCK_N, q.shape[-1], q.element_size(), quantized)
    if quantized:  # four stages make ptxas spill: see bench.compile_sweep
        num_stages = min(num_stages, 3)
    num_stages = stages_for_dtype(num_stages, q)
    (b, h, d), (_, page_size, g, _) = q.shape, cache.k_pages.shape
    out = torch.empty(b, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel():
        capacity = cache.block_table.shape[1] * page_size
        split_plan = plan_splits(numerics, b * g, capacity, BLOCK_N, PROGRAMS_PER_SM * num_sms(q.device))
        split_states, seq_lens = None, seq_lens.contiguous()
        if split_plan.max_splits > 1:
            acc = torch.empty(b, h, split_plan.max_splits, d, dtype=torch.float32, device=q.device)
            m_i, l_i = torch.empty(2, b, h, split_plan.max_splits, dtype=torch.float32, device=q.device)
            split_states = (acc, m_i, l_i)
        (k_pages, stride_k), (v_pages, stride_v) = map(page_tensors_and_strides, (cache.k_pages, cache.v_pages))
        _decode_attention_kernel[(b * g * split_plan.max_splits,)](
            q,
            k_pages,
            v_pages,
            cache.block_table,
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
            *cache.block_table.stride(),
            out.stride(),
            G=g,
            QUERIES_PER_KV=h // g,
            PAGE_SIZE=page_size,
            HEAD=dot_layout(d, kv_bits(cache.k_pages), single_block=True),
            MIN_KEYS=split_plan.min_keys,
            MAX_KEYS=split_plan.max_keys,
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
                MIN_KEYS=split_plan.min_keys,
                MAX_KEYS=split_plan.max_keys,
                BLOCK_S=16,
                BLOCK_D=triton.next_power_of_2(d),
                num_warps=4,
            )
    return out if lse is None else (out, lse)
