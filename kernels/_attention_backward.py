"""Gradients of attention, recomputed from its log-sum-exp: what the kernels for prompts and for images share.

Of a tile of scores, P = exp(scores · softmax_scale - lse) are the weights of the forward pass again, dP = grad_out vᵀ
their gradients, and dS = P ∘ (dP - delta) those of the scores, delta = sum(out · grad_out) of a query. Then

    grad_q = softmax_scale · dS k        grad_k = softmax_scale · dSᵀ q        grad_v = Pᵀ grad_out

Two kernels, so that every sum belongs to one program and is taken in a fixed order: one keeps BLOCK_M queries and walks
the keys, BLOCK_N at a time, for grad_q, and writes delta; the other keeps BLOCK_M keys and values and walks the queries
for grad_k and grad_v. Each takes scores with what it keeps as rows, so that the tiles of P and dS lie in registers as
the left operands of the products that follow.

Sources: Dao et al., FlashAttention (2022), appendix B.2, and FlashAttention-2 (2023), algorithm 2.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._launch import dot_block
from ._online_softmax import dot_qk

CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},  # on gfx942 two stages spill
]
BY_TARGET = dict.fromkeys(("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120"), 1)


def search_space(launch_cost: Callable[..., LaunchCost]) -> SearchSpace:
    """The configs of a kernel of such a cost: with blocks that a sequence or an image can fill."""
    return SearchSpace(
        {"BLOCK_M": [32, 64, 128], "BLOCK_N": [16, 32, 64], "num_warps": [4, 8], "num_stages": [1, 2, 3]},
        is_valid=lambda config, s, **_: max(config["BLOCK_M"], config["BLOCK_N"]) <= max(32, next_power_of_2(s)),
        launch_cost=launch_cost,
    )


def fit_tile(config: Config, q: Tensor) -> dict[str, int]:
    """The tile of a config for these operands, one that the registers hold:

    d up to 64      as it is
    d above 64      64 queries or keys at most, on 8 warps; in one stage 16 of the others at a time for 65 to 127
    d above 128     32 queries or keys, 16 of the others at a time, in one stage
    float32         16 on 4 warps, which multiply on their lanes; 32 of the others, or 16 for d above 80, in one stage
    """
    tile, d = dict(config), q.shape[-1]
    if q.element_size() > 2:
        return tile | {"BLOCK_M": 16, "BLOCK_N": 16 if d > 80 else 32, "num_warps": 4, "num_stages": 1}
    if d > 128:
        return tile | {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if d > 64:
        tile |= {"BLOCK_M": min(tile["BLOCK_M"], 64), "num_warps": 8}
        if d < 128 and tile["num_stages"] == 1:
            tile["BLOCK_N"] = 16
    return tile


def backward_launch_cost(config: Config, heads: int, rows: int, keys: int, d: int, dtype: str) -> LaunchCost:
    """Both launches as one: programs that keep `rows` queries, then `rows` keys, of each of `heads` heads, BLOCK_M at a
    time, and walk `keys` of the others.
    """
    size, block_m, block_n = DTYPE_BYTES[dtype], config["BLOCK_M"], config["BLOCK_N"]
    walked, block_d = block_n * cdiv(keys, block_n), dot_block(d)
    return LaunchCost(
        programs=2 * heads * cdiv(rows, block_m),
        bytes=(2 * keys + 4 * block_m) * d * size,
        bytes_per_stage=2 * block_n * block_d * size,
        dot_flops=7 * block_m * block_d * walked,  # three products for grad_q, four for grad_k and grad_v
        elementwise_ops=10 * block_m * walked,
    )


@triton.jit
def zero_heads(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Sums of heads in float32, before the first product."""
    BLOCK_D0: tl.constexpr = HEAD.BLOCK_D0
    BLOCK_D1: tl.constexpr = HEAD.BLOCK_D1
    if BLOCK_D1 > 0:
        return (tl.zeros([ROWS, BLOCK_D0], tl.float32), tl.zeros([ROWS, BLOCK_D1], tl.float32))
    else:
        return (tl.zeros([ROWS, BLOCK_D0], tl.float32),)


@triton.jit
def scale_heads(head, scale):
    """head · scale."""
    return [x * scale for x in head]


@triton.jit
def add_product(weights, x, acc):
    """acc + weights x, in the dtype of the heads x."""
    weights = weights.to(x[0].dtype)
    first = tl.dot(weights, x[0], acc[0], input_precision="ieee")
    if len(x) > 1:
        return (first, tl.dot(weights, x[1], acc[1], input_precision="ieee"))
    else:
        return (first,)


@triton.jit
def sum_of_products(a, b):
    """sum(a · b) of each head, in float32: [n]."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) > 1:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total


@triton.jit
def tile_weights(a, b, mask, scale, lse):
    """P [m, n] of the scores a bᵀ; `scale` and `lse`, [m, 1] or [1, n], are in base 2. `mask` [m, n] says which keys
    a query sees, None that it sees all.
    """
    scores = dot_qk(a, b)
    if mask is not None:  # before the exponential: of a key that is not there it may overflow
        scores = tl.where(mask, scores, float("-inf"))
    return tl.exp2(tl.fma(scores, scale, -lse))


@triton.jit
def add_grad_q(q, grad_out, k, v, mask, scale, lse, delta, grad_q):
    """grad_q + dS k, of queries [m] and one more tile of keys and values [n]; `lse` and `delta` [m]."""
    p = tile_weights(q, k, mask, scale, lse[:, None])
    ds = p * (dot_qk(grad_out, v) - delta[:, None])
    return add_product(ds, k, grad_q)


@triton.jit
def add_grad_kv(k, v, q, grad_out, mask, scale, lse, delta, grad_k, grad_v):
    """(grad_k + dSᵀ q, grad_v + Pᵀ grad_out), of keys and values [m] and one more tile of queries [n]; `lse` and
    `delta` [n]. A query that is not there is of zeros, with an lse of infinity.
    """
    p = tile_weights(k, q, mask, scale, lse[None, :])
    grad_v = add_product(p, grad_out, grad_v)
    ds = p * (dot_qk(v, grad_out) - delta[None, :])
    return add_product(ds, q, grad_k), grad_v


@triton.jit
def load_lse(ptrs, mask):
    """The log-sum-exp in base 2; infinity where `mask` is not set, so that weights are 0."""
    log2_e = 1.4426950408889634
    return tl.load(ptrs, mask=mask, other=float("inf")) * log2_e
