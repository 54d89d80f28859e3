"""Attention as the ops define it, and what `prefill_attention` and `decode_attention` share.

`numerics` says what is promised besides the result:

    fast              nothing
    batch_invariant   The bits of a token's output depend on its query and on the keys and values that it sees, in
                      their order: not on the other sequences of the batch, on how a prompt was cut into chunks, on the
                      page size or on which pages they are. It is a promise of one op and one implementation:
                      `prefill_attention` and `decode_attention` may add up in different orders, so what must repeat bit
                      for bit goes through the same one each time. Where pages are quantized, chunks matter: a chunk
                      sees its own tokens as they are, and those before it as the pages hold them;
                      `PagedBatch` of the cache rounds new keys and values first.

With `return_lse=True` attention returns (out, lse): lse [s, h] float32 is log(sum(exp(q kᵀ · softmax_scale))) over the
keys that a query sees, -inf if it sees none (its output is 0). `merge_attention_states` joins attention over parts of
the keys by it.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from vila_triton.registry import OneOf

from .dtypes import upcast

HEAD_DIMS = OneOf(32, 16, 24, 64, 72, 80, 96, 128)
QUERIES_PER_KV = OneOf(1, 2, 3, 4, 8)  # query heads per KV head
NUMERICS = OneOf("fast", "batch_invariant")


@dataclass(frozen=True)
class RaggedBatch:
    """New tokens of b sequences, laid end to end.

    query_start_loc   [b+1] int32: the new tokens of sequence i are rows query_start_loc[i] to query_start_loc[i+1]
    context_lens      [b] int32: how many tokens of each sequence are cached before them
    """

    query_start_loc: Tensor
    context_lens: Tensor

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)


def attention_scores(q: Tensor, k: Tensor, softmax_scale: float, mask: Tensor | None = None) -> Tensor:
    """q kᵀ · softmax_scale of one sequence, [g, h/g, s, t], and -inf where the mask [s, t] is False.

    q [s, h, d], k [t, g, d].
    """
    q = rearrange(q, "s (g n) d -> s g n d", g=k.shape[1])
    scores = einsum(upcast(q), upcast(k), "s g n d, t g d -> g n s t") * softmax_scale
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def attention_weights(q: Tensor, k: Tensor, softmax_scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · softmax_scale) of one sequence, [g, h/g, s, t]; arguments as in `attention_scores`."""
    return attention_scores(q, k, softmax_scale, mask).softmax(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · softmax_scale) v of one sequence, [s, h, d]: q [s, h, d], k and v [t, g, d], mask [s, t].

    The h query heads are g runs of h/g, one run for each KV head. No key at all gives 0.
    """
    weights = upcast(attention_weights(q, k, softmax_scale, mask).to(v.dtype))
    return rearrange(einsum(weights, upcast(v), "g n s t, t g d -> s g n d"), "s g n d -> s (g n) d").to(q.dtype)


def causal_mask(s: int, t: int, device: torch.device) -> Tensor:
    """A mask [s, t]: the s queries are the last of the t tokens, and each sees itself and the tokens before it."""
    return torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, numerics: str = "fast", return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of the last s of t tokens, each to itself and those before it: (out [s, h, d], lse [s, h] or None).

    Under "batch_invariant" it takes one query after the other, so that every sum is as long as the keys its query sees.
    """
    s, t = len(q), len(k)
    if numerics == "batch_invariant" and s > 1:
        rows = [
            causal_attention(q[i : i + 1].clone(), k[:end], v[:end], softmax_scale, numerics, return_lse)
            for i, end in enumerate(range(t - s + 1, t + 1))
        ]
        lse = torch.cat([x for _, x in rows if x is not None]) if return_lse else None
        return torch.cat([out for out, _ in rows]), lse
    mask = causal_mask(s, t, q.device)
    out = masked_attention(q, k, v, softmax_scale, mask)
    if not return_lse:
        return out, None
    return out, rearrange(attention_scores(q, k, softmax_scale, mask).logsumexp(-1), "g n s -> s (g n)")


def merge_attention_states(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over n parts of them: outputs [n, s, h, d], lses [n, s, h] natural logs.

    Returns (out [s, h, d] in the dtype of outputs, lse [s, h] in that of lses), which can be merged further. A part
    that saw no key (lse -inf) counts for nothing, whatever its output is; where all are such, out is 0 and lse -inf.

    Raises ValueError for shapes that do not fit.
    """
    if outputs.shape[:-1] != lses.shape:
        raise ValueError(
            f"merge_attention_states: outputs are {list(outputs.shape)} and lses {list(lses.shape)}, expected [n, s, h]"
        )
    max_lse = upcast(lses).amax(0)  # [s, h]
    max_lse = torch.where(max_lse.isneginf(), 0.0, max_lse)
    weights = (upcast(lses) - max_lse).exp()  # [n, s, h]
    weight_sum = weights.sum(0)
    nonempty_outputs = torch.where((weights == 0)[..., None], 0.0, upcast(outputs))
    out = (
        einsum(weights, nonempty_outputs, "n s h, n s h d -> s h d")
        / torch.where(weight_sum == 0, 1.0, weight_sum)[..., None]
    )
    return out.to(outputs.dtype), (weight_sum.log() + max_lse).to(lses.dtype)


def check_heads(op_name: str, sizes: dict[str, int]) -> None:
    """Raise ValueError unless the number of query heads, h, is a multiple of the number of KV heads, g."""
    if not sizes["g"] or sizes["h"] % sizes["g"]:
        raise ValueError(f"{op_name}: {sizes['h']} query heads are not a multiple of {sizes['g']} key/value heads")


def check_numerics(op_name: str, numerics: str) -> None:
    """Raise ValueError unless `numerics` is one of `NUMERICS`."""
    if numerics not in NUMERICS:
        raise ValueError(f"{op_name}: no numerics {numerics!r}; there are: {', '.join(NUMERICS.values)}")
