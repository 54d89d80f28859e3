"""softmax(q kᵀ · scale) v of every position of an image over every position of it.

One program takes BLOCK_M queries of one head of one image and walks all keys BLOCK_N at a time with an online softmax
in base 2: whole tiles without a mask, then the rest of the image, if there is one (729 = 11 · 64 + 25), with it. A head
of 72 or 80 numbers is a block of 64 and one of 16, so a third of the lanes that 128 would take is not there.

q, k, v and out [b, s, h, d], any strides, lse [b, s, h]. Strides are compile-time constants: a vision tower has one of
each, and unknown ones cost the registers that the tiles need.

Source: Dao et al., FlashAttention (2022) and FlashAttention-2 (2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import encoder_attention
from vila_triton.registry import Unsupported
from vila_triton.registry.search_space import Config, LaunchCost, SearchSpace, next_power_of_2

from ._heads import dot_layout, load_heads, store_heads
from ._launch import LOG2_E, MAX_GRID_YZ, attention_launch_cost, check_supported
from ._online_softmax import attend_tile, init_softmax, log_sum_exp, normalize

CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
]


def launch_cost(config: Config, b: int, s: int, h: int, d: int, dtype: str) -> LaunchCost:
    """Return the cost of one launch over b images of s positions each."""
    return attention_launch_cost(config, heads=b * h, rows=s, keys=s, d=d, dtype=dtype)


SPACE = SearchSpace(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [16, 32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4, 5],
    },
    is_valid=lambda config, s, **_: max(config["BLOCK_M"], config["BLOCK_N"]) <= max(16, next_power_of_2(s)),
    launch_cost=launch_cost,
)


@triton.jit
def _encoder_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [b, s, h] or None
    scale,
    S,
    stride_q: tl.constexpr,  # of b, s, h and d
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    stride_o: tl.constexpr,
    stride_l: tl.constexpr,  # of b, s and h, if there is an lse
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16, "tl.dot needs 16 rows and columns")
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    k_ptr += image * stride_k[0] + head * stride_k[2]
    v_ptr += image * stride_v[0] + head * stride_v[2]
    q_ptr += image * stride_q[0] + head * stride_q[2]
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = load_heads(q_ptr, rows.to(tl.int64) * stride_q[1], rows < S, stride_q[3], HEAD)
    m_i, l_i, acc = init_softmax(BLOCK_M, HEAD)

    full_end = S // BLOCK_N * BLOCK_N
    for n in range(0, full_end, BLOCK_N):
        start, offs_n = tl.cast(n, tl.int64), tl.arange(0, BLOCK_N).to(tl.int64)
        k = load_heads(k_ptr + start * stride_k[1], offs_n * stride_k[1], None, stride_k[3], HEAD)
        v = load_heads(v_ptr + start * stride_v[1], offs_n * stride_v[1], None, stride_v[3], HEAD)
        m_i, l_i, acc = attend_tile(q, k, v, None, scale, m_i, l_i, acc)
    for n in tl.range(full_end, S, BLOCK_N, num_stages=1):  # once at most
        offs_n = n + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = offs_n < S
        k = load_heads(k_ptr, offs_n * stride_k[1], mask, stride_k[3], HEAD)
        v = load_heads(v_ptr, offs_n * stride_v[1], mask, stride_v[3], HEAD)
        m_i, l_i, acc = attend_tile(q, k, v, mask[None, :], scale, m_i, l_i, acc)

    out_ptr += image * stride_o[0] + head * stride_o[2]
    store_heads(out_ptr, rows.to(tl.int64) * stride_o[1], rows < S, stride_o[3], normalize(acc, l_i), HEAD)
    if lse_ptr is not None:
        lse_ptr += image * stride_l[0] + head * stride_l[2]
        tl.store(lse_ptr + rows.to(tl.int64) * stride_l[1], log_sum_exp(m_i, l_i), mask=rows < S)


def fit_tile(config: Config, q: Tensor) -> dict[str, int]:
    """The tile of a config for these operands, one that the registers hold:

    d up to 128     as it is, but of one stage for 81 to 127: more spill on sm_100
    d above 128     64 queries at most, on 8 warps if they are 64, and 32 keys at most
    float32         16 queries on 4 warps, which multiply on their lanes; 32 keys, or 16 for d above 80, in one stage
    """
    tile, d = dict(config), q.shape[-1]
    if q.element_size() > 2:
        return tile | {"BLOCK_M": 16, "BLOCK_N": 16 if d > 80 else 32, "num_warps": 4, "num_stages": 1}
    if 80 < d < 128:
        tile["num_stages"] = 1
    if d > 128:
        rows = min(tile["BLOCK_M"], 64)
        tile |= {"BLOCK_M": rows, "BLOCK_N": min(tile["BLOCK_N"], 32), "num_warps": 8 if rows == 64 else 4}
    return tile


@encoder_attention.impl("triton", configs=CONFIGS, space=SPACE)
def encoder_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    return_lse: bool = False,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    num_warps: int,
    num_stages: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention [b, s, h, d], and with `return_lse` its log-sum-exp [b, s, h] in float32.

    Raises Unsupported for dtypes, heads and scales it does not serve.
    """
    check_supported("encoder_attention", q, k, v)
    if not softmax_scale > 0:
        raise Unsupported(f"encoder_attention: softmax_scale is {softmax_scale}, expected a positive number")
    b, s, h, d = q.shape
    if h > MAX_GRID_YZ:
        raise Unsupported(f"encoder_attention: {h} heads, a launch has room for {MAX_GRID_YZ}")
    out = torch.empty(b, s, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, s, h, dtype=torch.float32, device=q.device) if return_lse else None
    config = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "num_stages": num_stages}
    tile = fit_tile(config, q)
    for first in range(0, b if out.numel() else 0, MAX_GRID_YZ):
        images = slice(first, first + MAX_GRID_YZ)
        _encoder_attention_kernel[(triton.cdiv(s, tile["BLOCK_M"]), h, min(b - first, MAX_GRID_YZ))](
            q[images],
            k[images],
            v[images],
            out[images],
            None if lse is None else lse[images],
            softmax_scale * LOG2_E,
            s,
            stride_q=q.stride(),
            stride_k=k.stride(),
            stride_v=v.stride(),
            stride_o=out.stride(),
            stride_l=None if lse is None else lse.stride(),
            HEAD=dot_layout(d),
            **tile,
        )
    return out if lse is None else (out, lse)
