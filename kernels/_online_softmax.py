"""Online softmax over tiles of keys, in base 2.

For each row of queries, m_i is the largest score so far, l_i the sum of the weights 2^(score - m_i), and acc the sum of
the values with these weights; the output is acc / l_i. Heads and acc are tuples of blocks, as `_heads` describes.

Sources: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Dao et al., FlashAttention (2022).
"""

import triton
import triton.language as tl


@triton.jit
def init_softmax(BLOCK_M: tl.constexpr, HEAD: tl.constexpr):
    """(m_i, l_i, acc) before the first tile. m_i is finite, so that -inf - m_i is never NaN."""
    BLOCK_D0: tl.constexpr = HEAD.BLOCK_D0
    BLOCK_D1: tl.constexpr = HEAD.BLOCK_D1
    m_i = tl.full([BLOCK_M], -1.0e38, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
    if BLOCK_D1 > 0:
        return m_i, l_i, (acc, tl.zeros([BLOCK_M, BLOCK_D1], tl.float32))
    else:
        return m_i, l_i, (acc,)


@triton.jit
def dot_qk(q, k):
    """q kᵀ of heads: [m, n]."""
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if len(q) > 1:
        scores = tl.dot(q[1], tl.trans(k[1]), scores, input_precision="ieee")
    return scores


@triton.jit
def softmax_weights(scores, scale, m_i, l_i):
    """One more tile of scores [BLOCK_M, n], times a scale above 0: (weights [BLOCK_M, n], rescale [BLOCK_M], m_i, l_i).

    What was summed under the old m_i must be multiplied by `rescale`. The explicit fma leaves the compiler no choice of
    rounding, so a tile gives the same bits with a mask that hides nothing as without one. A tile that hides everything
    (scores of -inf) changes nothing.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -m_new[:, None]))
    rescale = tl.exp2(m_i - m_new)
    return weights, rescale, m_new, tl.fma(l_i, rescale, tl.sum(weights, 1))


@triton.jit
def add_values(weights, v, acc, rescale):
    """acc · rescale + weights v."""
    first = tl.dot(weights, v[0], acc[0] * rescale[:, None], input_precision="ieee")
    if len(v) > 1:
        return (first, tl.dot(weights, v[1], acc[1] * rescale[:, None], input_precision="ieee"))
    else:
        return (first,)


@triton.jit
def attend_tile(q, k, v, mask, scale, m_i, l_i, acc):
    """Attention to one more tile of keys and values [n, d]: the new (m_i, l_i, acc).

    `scale` is above 0 and includes log2(e); `mask` [BLOCK_M, n] says which keys a query sees, None that it sees all.
    """
    scores = dot_qk(q, k)
    if mask is not None:
        scores = tl.where(mask, scores, float("-inf"))
    weights, rescale, m_i, l_i = softmax_weights(scores, scale, m_i, l_i)
    return m_i, l_i, add_values(weights.to(v[0].dtype), v, acc, rescale)


@triton.jit
def normalize(acc, l_i):
    """acc / l_i, the output; 0 for a row that has seen no key."""
    divisor = tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    return [x / divisor for x in acc]


@triton.jit
def log_sum_exp(m_i, l_i):
    """The natural logarithm of the sum of exponentials, -inf for a row that has seen no key."""
    ln_2 = 0.6931471805599453
    return tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(tl.where(l_i == 0.0, 1.0, l_i))) * ln_2)
