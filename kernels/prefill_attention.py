"""softmax(q kᵀ · scale) v of a chunk of new tokens, causal, over the cached pages and then over the chunk itself.

One program takes BLOCK_M rows of one key/value head of one sequence; a row is a pair (query, query head of the group),
so all heads that share keys share their loads. The grid depends on the number of tokens and sequences alone: a program
finds its sequence by bisection, and those that see the most keys start first. It walks the keys in tiles of BLOCK_N,
which begin at multiples of BLOCK_N counted from the first token of the sequence: whole tiles of the history in its
pages; the tile in which the history ends and the chunk begins; tiles of the chunk that all its rows see; and the
diagonal. Only the second and the last kind need masks. The chunk's own keys are never read from pages.

So a sum runs over the same tiles in the same order wherever a chunk begins and however the pages lie. Under the numerics
"invariant" the tile does not depend on the config either: it is that of CONFIGS[0].

q [s, h, d], k and v [s, g, d], pages [p, l, g, d], any strides, plain or quantised; head h of the h/g that share
key/value head g is row r % (h/g) of its group. Strides are compile-time constants: a model has few, and unknown ones
cost the registers the tiles need.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import KVPages, QuantizedKVPages, prefill_attention
from vila_triton.registry import Unsupported
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace, next_power_of_2

from ._kv_pages import (
    check_pages_supported,
    head_constants,
    load_heads,
    load_paged_heads,
    page_tensors_and_strides,
    pages_and_rows,
    store_heads,
)
from ._launch import LOG2_E, MAX_GRID_YZ, attention_launch_cost, check_supported, rows_for_dtype, stages_for_dtype
from ._online_softmax import attend_tile, divide_heads, init_softmax, log_sum_exp
from ._varlen import apply_token_scales, find_sequence, max_tiles, query_and_head, select_heads

CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
]


def launch_cost(config: Config, b: int, s: int, t: int, g: int, ratio: int, d: int, dtype: str, **_) -> LaunchCost:
    """A query of the chunk sees half of it on average."""
    return attention_launch_cost(config, heads=b * g, rows=s * ratio, keys=t + s // 2 + 1, d=d, dtype=dtype)


def is_valid_config(config: Config, s: int, ratio: int, numerics: str = "fast", **_) -> bool:
    is_default = all(config[name] == n for name, n in CONFIGS[0].items())
    return is_default if numerics == "invariant" else config["BLOCK_M"] <= max(16, next_power_of_2(s * ratio))


SPACE = SearchSpace(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    is_valid=is_valid_config,
    launch_cost=launch_cost,
)


@triton.jit(do_not_specialize=["b", "stride_tb"])  # stride_tb changes with the longest sequence
def _prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_pages,  # (values, scales, zeros)
    v_pages,
    table_ptr,
    start_ptr,
    history_ptr,
    out_ptr,
    lse_ptr,  # [s, h] or None
    scale,
    b,
    stride_tb,
    stride_tp,
    stride_q: tl.constexpr,  # of s, h and d
    stride_k: tl.constexpr,  # of s, g and d
    stride_v: tl.constexpr,
    stride_kp: tl.constexpr,  # of p, l, g and d of the values, then of scales and zeros
    stride_vp: tl.constexpr,
    stride_o: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    tl.static_assert(WIDTH <= FIRST and D - WIDTH <= REST and FIRST >= 16, "the blocks cover the head")
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    sequence, row = find_sequence(tl.num_programs(0) - 1 - tl.program_id(0), start_ptr, b, RATIO, BLOCK_M)
    group = tl.program_id(1).to(tl.int64)
    first = tl.load(start_ptr + sequence).to(tl.int64)
    length = (tl.load(start_ptr + sequence + 1) - first).to(tl.int32)
    if row >= length * RATIO:
        return
    history = tl.load(history_ptr + sequence)

    query, head, mine = query_and_head(row, group, length, RATIO, BLOCK_M)
    at = (first + query) * stride_q[0] + head * stride_q[1]
    q = load_heads(q_ptr, at, mine, stride_q[2], D, WIDTH, FIRST, REST)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    peak, total, acc = init_softmax(BLOCK_M, FIRST, REST)

    table_ptr += sequence * stride_tb
    every = tl.full([BLOCK_N], 1, tl.int1)
    whole = history // BLOCK_N * BLOCK_N
    for n in range(0, whole, BLOCK_N):
        page, line = pages_and_rows(table_ptr, stride_tp, n, every, PAGE, BLOCK_N)
        k, scales = load_paged_heads(k_pages, stride_kp, page, line, group, every, dtype, BITS, D, WIDTH, FIRST, REST)
        k = apply_token_scales(k, scales)
        v, scales = load_paged_heads(v_pages, stride_vp, page, line, group, every, dtype, BITS, D, WIDTH, FIRST, REST)
        v = apply_token_scales(v, scales)
        peak, total, acc = attend_tile(q, k, v, None, scale, peak, total, acc)

    k_ptr += group * stride_k[1]
    v_ptr += group * stride_v[1]
    position = history + query  # of the queries in their sequence, [BLOCK_M]
    end = history + tl.minimum((row + BLOCK_M - 1) // RATIO + 1, length)  # keys that the last query sees
    offset = first - history  # from a token's position in its sequence to its row of k and v
    for n in tl.range(whole, history, BLOCK_N, num_stages=1):  # once at most
        tokens = n + tl.arange(0, BLOCK_N)
        old, known, of = tokens < history, (tokens >= history) & (tokens < end), offset + tokens
        k_new = load_heads(k_ptr, of * stride_k[0], known, stride_k[2], D, WIDTH, FIRST, REST)
        v_new = load_heads(v_ptr, of * stride_v[0], known, stride_v[2], D, WIDTH, FIRST, REST)
        page, line = pages_and_rows(table_ptr, stride_tp, n, old, PAGE, BLOCK_N)
        k, scales = load_paged_heads(k_pages, stride_kp, page, line, group, old, dtype, BITS, D, WIDTH, FIRST, REST)
        k = select_heads(old, apply_token_scales(k, scales), k_new)
        v, scales = load_paged_heads(v_pages, stride_vp, page, line, group, old, dtype, BITS, D, WIDTH, FIRST, REST)
        v = select_heads(old, apply_token_scales(v, scales), v_new)
        visible = tokens[None, :] <= position[:, None]
        peak, total, acc = attend_tile(q, k, v, visible, scale, peak, total, acc)

    begin = tl.cdiv(history, BLOCK_N) * BLOCK_N
    diagonal = tl.maximum(begin, (history + row // RATIO + 1) // BLOCK_N * BLOCK_N)
    for n in range(begin, diagonal, BLOCK_N):
        tile, of = offset + n, tl.arange(0, BLOCK_N).to(tl.int64)
        k = load_heads(k_ptr + tile * stride_k[0], of * stride_k[0], None, stride_k[2], D, WIDTH, FIRST, REST)
        v = load_heads(v_ptr + tile * stride_v[0], of * stride_v[0], None, stride_v[2], D, WIDTH, FIRST, REST)
        peak, total, acc = attend_tile(q, k, v, None, scale, peak, total, acc)
    for n in range(diagonal, end, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        known, of = tokens < end, offset + tokens
        k = load_heads(k_ptr, of * stride_k[0], known, stride_k[2], D, WIDTH, FIRST, REST)
        v = load_heads(v_ptr, of * stride_v[0], known, stride_v[2], D, WIDTH, FIRST, REST)
        visible = tokens[None, :] <= position[:, None]
        peak, total, acc = attend_tile(q, k, v, visible, scale, peak, total, acc)

    # Where the rows lie is worked out anew, behind a load the compiler may not merge with the first one: kept through
    # the loops, it would take the registers that they need.
    row += (tl.load(start_ptr + sequence, volatile=True) - first).to(tl.int32)
    query, head, mine = query_and_head(row, group, length, RATIO, BLOCK_M)
    at = (first + query) * stride_o[0] + head * stride_o[1]
    store_heads(out_ptr, at, mine, stride_o[2], divide_heads(acc, total), D, WIDTH)
    if lse_ptr is not None:
        heads = tl.num_programs(1) * RATIO
        tl.store(lse_ptr + (first + query) * heads + head, log_sum_exp(peak, total), mask=mine)


def fit_tile(config: Config, q: Tensor, pages: KVPages) -> dict[str, int]:
    """The tile of a config for these operands: smaller where the registers would not hold it."""
    tile = dict(config)
    if q.shape[-1] > 128:
        tile |= {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4}
    elif isinstance(pages, QuantizedKVPages):
        tile["BLOCK_N"] = min(tile["BLOCK_N"], 32)
        if (
            pages.bits == 8 and q.shape[-1] > 32
        ):  # with fewer stages ptxas spills at some widths: see bench.compile_sweep
            tile["num_stages"] = max(tile["num_stages"], 4)
    return tile | {"BLOCK_M": rows_for_dtype(tile["BLOCK_M"], q), "num_stages": stages_for_dtype(tile["num_stages"], q)}


@prefill_attention.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def prefill_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    block_table: Tensor,
    query_start_loc: Tensor,
    context_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> Tensor | tuple[Tensor, Tensor]:
    check_supported("prefill_attention", q, k, v)
    check_pages_supported("prefill_attention", k_pages, v_pages)
    if not softmax_scale > 0:
        raise Unsupported(f"prefill_attention: scale is {softmax_scale}, expected a positive number")
    config = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    tile = fit_tile(CONFIGS[0] if numerics == "invariant" else config, q, k_pages)
    (s, h, d), g, b = q.shape, k.shape[1], len(context_lens)
    if g > MAX_GRID_YZ:
        raise Unsupported(f"prefill_attention: {g} key heads, a launch has room for {MAX_GRID_YZ}")
    out = torch.empty(s, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(s, h, dtype=torch.float32, device=q.device) if return_lse else None
    (k_pool, stride_kp), (v_pool, stride_vp) = page_tensors_and_strides(k_pages), page_tensors_and_strides(v_pages)
    if out.numel():
        _prefill_attention_kernel[(max_tiles(s, b, h // g, tile["BLOCK_M"]), g)](
            q,
            k,
            v,
            k_pool,
            v_pool,
            block_table,
            query_start_loc.contiguous(),
            context_lens.contiguous(),
            out,
            lse,
            softmax_scale * LOG2_E,
            b,
            *block_table.stride(),
            stride_q=q.stride(),
            stride_k=k.stride(),
            stride_v=v.stride(),
            stride_kp=stride_kp,
            stride_vp=stride_vp,
            stride_o=out.stride(),
            RATIO=h // g,
            D=d,
            PAGE=k_pages.shape[1],
            **head_constants(d, k_pages),
            **tile,
        )
    return out if lse is None else (out, lse)
