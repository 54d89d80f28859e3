"""Attention, three ways: a chunk of a prompt (`prefill`), one new token (`decode`), a picture (`encoder`).

A ragged batch is laid end to end: sequence i owns rows query_start[i] to query_start[i+1] of the new tokens. What it
cached before lies in pages, as `paged` describes.

`policy` says what besides the result is promised:

    fast        nothing
    invariant   the bits of a token's output depend on its query and on the keys and values it sees, in their order:
                not on the other sequences of the batch, how a prompt was cut into chunks, the length of pages or
                which they are. It is a promise of one op and one implementation: `prefill_attention` and
                `decode_attention` may add up in different orders, so what must repeat bit for bit goes through the
                same one each time. And where pages are quantised, chunks matter: a chunk sees its own tokens as they
                are, and those before as the pages hold them.

With `lse=True` attention returns (out, lse): lse [s, h] float32 is log(sum(exp(q kᵀ · scale))) over the keys a query
sees, -inf if it sees none (its output is 0). `merge` joins attentions over parts of the keys by it.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from vila_triton.registry import OneOf

from .dtypes import upcast

HEAD_DIMS = OneOf(32, 16, 24, 64, 72, 80, 96, 128)
QUERIES_PER_KV = OneOf(1, 2, 3, 4, 8)  # query heads per key/value head
NUMERICS = OneOf("fast", "invariant")


def attention_scores(q: Tensor, k: Tensor, softmax_scale: float, mask: Tensor | None = None) -> Tensor:
    """q kᵀ · scale of one sequence, q [s, h, d] and k [t, g, d] -> [g, h/g, s, t]; -inf where not visible [s, t]."""
    q = rearrange(q, "s (g n) d -> s g n d", g=k.shape[1])
    scores = einsum(upcast(q), upcast(k), "s g n d, t g d -> g n s t") * softmax_scale
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def attention_weights(q: Tensor, k: Tensor, softmax_scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) for one sequence: q [s, h, d], k [t, g, d], visible [s, t] -> [g, h/g, s, t]."""
    return attention_scores(q, k, softmax_scale, mask).softmax(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v for one sequence: q [s, h, d], k and v [t, g, d], visible [s, t] -> [s, h, d].

    Query heads h are g runs of h/g, one run for each key/value head. No key at all gives 0.
    """
    weights = upcast(attention_weights(q, k, softmax_scale, mask).to(v.dtype))
    return rearrange(einsum(weights, upcast(v), "g n s t, t g d -> s g n d"), "s g n d -> s (g n) d").to(q.dtype)


def causal_mask(s: int, t: int, device: torch.device) -> Tensor:
    """visible [s, t]: the s queries are the last of the t tokens, and each sees itself and what came before."""
    return torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, numerics: str = "fast", return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of the last s of t tokens, each to itself and what came before: (out [s, h, d], lse [s, h] if asked).

    Under `invariant` one query after the other, so that every sum is as long as the keys its query sees.
    """
    s, t = len(q), len(k)
    if numerics == "invariant" and s > 1:
        rows = [
            causal_attention(
                q[i : i + 1].clone(), k[: t - s + 1 + i], v[: t - s + 1 + i], softmax_scale, numerics, return_lse
            )
            for i in range(s)
        ]
        return torch.cat([out for out, _ in rows]), torch.cat(
            [x for _, x in rows if x is not None]
        ) if return_lse else None
    mask = causal_mask(s, t, q.device)
    out = masked_attention(q, k, v, softmax_scale, mask)
    if not return_lse:
        return out, None
    return out, rearrange(attention_scores(q, k, softmax_scale, mask).logsumexp(-1), "g n s -> s (g n)")


def merge_attention_states(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attentions over n parts of them: outputs [n, s, h, d], lses [n, s, h] natural logs.

    Returns (out [s, h, d] in the dtype of outputs, lse [s, h] in that of lses), which merge further. A part that saw no
    key (lse -inf) counts for nothing, whatever its output; where all are such, out is 0 and lse -inf.
    """
    if outputs.shape[:-1] != lses.shape:
        raise ValueError(f"merge: outputs are {list(outputs.shape)} and lses {list(lses.shape)}, expected [n, s, h]")
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
    if not sizes["g"] or sizes["h"] % sizes["g"]:
        raise ValueError(f"{op_name}: {sizes['h']} query heads are not a multiple of {sizes['g']} key/value heads")


def check_numerics(op_name: str, numerics: str) -> None:
    if numerics not in NUMERICS:
        raise ValueError(f"{op_name}: no policy {numerics!r}; there are: {', '.join(NUMERICS.values)}")
