"""Hard cases of the three attentions: each changes the queries, keys and values of one sequence.

A change takes (q [s, h, d], k and v [t, g, d], a CPU generator), the cached and the new tokens of the sequence in their
order, in float32, and returns (q, k, v). Scores are steered by queries above 0 and keys that point along the diagonal:
then every query of a token gives keys of `along_diagonal(c, d)` about the score c.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .kv_pages import PagedKV, write_tokens

Change = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]
SCORE_RANGE = 16.0  # exp(-16) is about one rounding of float32
CHANGES: dict[str, Change] = {}


def change(fn: Change) -> Change:
    """Register a change under its name."""
    CHANGES[fn.__name__] = fn
    return fn


def along_diagonal(scores: Tensor, like: Tensor) -> Tensor:
    """Keys [t, g, d] whose scores are about `scores` [t], for queries |N(0, 1)| and a softmax scale of d ** -0.5."""
    mean_query = (2 / torch.pi) ** 0.5
    return (scores.to(like.device)[:, None, None] / (mean_query * like.shape[-1] ** 0.5)).expand_as(like)


@change
def rising_scores(q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Every key has a higher score than those before it, so that every tile rescales what was summed before."""
    return q.abs(), 0.1 * k + along_diagonal(torch.linspace(0, SCORE_RANGE, len(k)), k), v


@change
def falling_scores(q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first key has the highest score, and whatever is summed after its tile is almost nothing beside it."""
    return q.abs(), 0.1 * k + along_diagonal(torch.linspace(SCORE_RANGE, 0, len(k)), k), v


@change
def first_key_far_above(q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first key has all of the weight, by so much that its exponential overflows float32 if the largest score of a
    later tile is subtracted from it.
    """
    scores = torch.zeros(len(k))
    scores[:1] = 200
    return q.abs(), 0.1 * k + along_diagonal(scores, k), v


@change
def far_value(q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One value is 1000 times the others, and its weight about a thousandth of all."""
    if not len(k):
        return q, k, v
    far = int(torch.randint(len(k), (), generator=rng))
    k[far] = along_diagonal(torch.tensor([len(k) / 1000]).log(), k[:1])
    v[far] *= 1000
    return q.abs(), k, v


@change
def equal_scores(q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """All keys are the same, so that the output is the mean of the values."""
    return q, k[:1].expand_as(k), v


@change
def negative_scores(q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """All scores are so far below 0 that their exponentials are 0 in float32."""
    return q.abs(), k + along_diagonal(torch.full((len(k),), -110.0), k), v


def change_sequence(
    change: Change, rng: torch.Generator, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a change to a sequence that is not cached; the results have the dtype of q."""
    new_q, new_k, new_v = (x.to(q.dtype) for x in change(q.float(), k.float().clone(), v.float().clone(), rng))
    return new_q, new_k, new_v


def change_cached_sequence(
    change: Change, rng: torch.Generator, q: Tensor, k: Tensor, v: Tensor, cache: PagedKV, i: int, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a change to sequence i, whose first t tokens lie in the cache, and are changed there, before k and v."""
    keys, values = (torch.cat((old.float(), new.float())) for old, new in zip(cache.gather(i, t), (k, v)))
    new_q, keys, values = change(q.float(), keys, values, rng)
    tokens = torch.arange(t, device=q.device)
    slots = cache.block_table[i, tokens // cache.page_size].long() * cache.page_size + tokens % cache.page_size
    write_tokens(keys[:t], cache.k_pages, slots)
    write_tokens(values[:t], cache.v_pages, slots)
    return new_q.to(q.dtype), keys[t:].to(q.dtype), values[t:].to(q.dtype)
