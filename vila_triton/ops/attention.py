"""Attention, three ways: a chunk of a prompt, one new token, a picture.

A ragged batch is laid end to end: sequence i owns rows query_start[i] to query_start[i+1] of the new tokens. What it
cached before lies in pages, as `paged` describes.
"""
# pyright: reportInvalidTypeForm=false

import torch
from einops import einsum, rearrange
from torch import Tensor

from vila_triton.registry import OneOf, Sizes, op

from .domain import DTYPES, draw, name_of, wide
from .paged import PAGE_LENGTHS, draw_pages, gather
from .shapes import axes, same_dtype

HEAD_DIMS = OneOf(32, 16, 24, 64, 72, 80, 96, 128)
RATIOS = OneOf(1, 2, 3, 4, 8)  # query heads per key/value head


def weights(q: Tensor, k: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) for one sequence: q [s, h, d], k [t, g, d], visible [s, t] -> [g, h/g, s, t]."""
    q = rearrange(q, "s (g n) d -> s g n d", g=k.shape[1])
    scores = einsum(wide(q), wide(k), "s g n d, t g d -> g n s t") * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v for one sequence: q [s, h, d], k and v [t, g, d], visible [s, t] -> [s, h, d].

    Query heads h are g runs of h/g, one run for each key/value head. No key at all gives 0.
    """
    p = wide(weights(q, k, scale, visible).to(v.dtype))
    return rearrange(einsum(p, wide(v), "g n s t, t g d -> s g n d"), "s g n d -> s (g n) d").to(q.dtype)


def causal(s: int, t: int, device: torch.device) -> Tensor:
    """visible [s, t]: the s queries are the last of the t tokens, and each sees itself and what came before."""
    return torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)


@op
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    history: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of a chunk of new tokens to the cached history of its sequence and to itself.

    q [s, h, d], k and v [s, g, d] the new tokens; k_pages and v_pages [p, l, g, d]; block_table [b, pages] int32;
    query_start [b+1] int32; history [b] int32 cached tokens before the chunk -> [s, h, d]. The chunk's own keys and
    values are taken from k and v, so it does not matter whether they have been written to the pages yet. Not checked,
    since the values lie on the device: block_table names a page for every cached token, and query_start ends at s.
    """
    out = []
    for i, t in enumerate(history.tolist()):
        rows = slice(*query_start[i : i + 2].tolist())
        keys, values = (
            torch.cat((gather(pages, block_table[i], t).to(new.dtype), new[rows]))
            for pages, new in ((k_pages, k), (v_pages, v))
        )
        out.append(attend(q[rows], keys, values, scale, causal(rows.stop - rows.start, len(keys), q.device)))
    return torch.cat(out) if out else torch.empty_like(q)


@prefill_attention.requires
def _(q, k, v, k_pages, v_pages, block_table, query_start, history, scale) -> None:
    sizes = axes(
        "prefill_attention",
        q=(q, "s h d"),
        k=(k, "s g d"),
        v=(v, "s g d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        history=(history, "b"),
        block_table=(block_table, "b pages"),
        query_start=(query_start, "b+1"),
    )
    same_dtype("prefill_attention", q=q, k=k, v=v)
    check_heads("prefill_attention", sizes)
    if sizes["b+1"] != sizes["b"] + 1:
        raise ValueError(f"prefill_attention: query_start has {sizes['b+1']} entries for {sizes['b']} sequences")


def check_heads(where: str, sizes: dict[str, int]) -> None:
    if not sizes["g"] or sizes["h"] % sizes["g"]:
        raise ValueError(f"{where}: {sizes['h']} query heads are not a multiple of {sizes['g']} key/value heads")


@prefill_attention.inputs
def _(
    b: Sizes(1, 3),
    s: Sizes(1, 40),
    t: Sizes(0, 70),
    g: Sizes(1, 3),
    ratio: RATIOS,
    d: HEAD_DIMS,
    l: PAGE_LENGTHS,
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    """The first sequence has s new tokens after t cached ones; the others fewer, none included."""
    new = [s, *torch.randint(0, s + 1, (b - 1,), generator=rng).tolist()]
    history = [t, *torch.randint(0, t + 1, (b - 1,), generator=rng).tolist()]
    k_pages, v_pages, block_table = draw_pages(history, l, g, d, dtype, rng, device)
    q, k, v = (draw(sum(new), h, d, dtype=dtype, rng=rng, device=device) for h in (g * ratio, g, g))
    query_start = torch.tensor([0, *new]).cumsum(0).to(device, torch.int32)
    return q, k, v, k_pages, v_pages, block_table, query_start, torch.tensor(history, device=device).int(), d**-0.5


prefill_attention.result(
    lambda q, k, v, k_pages, v_pages, block_table, query_start, history, scale: q.new_empty(q.shape)
)


@prefill_attention.sizes("b", "s", "t")
def _(q, k, v, k_pages, v_pages, block_table, query_start, history, scale):
    """Lengths lie on the device, so s is their mean, and t what the block table has room for beside s."""
    (_, h, d), (_, l, g, _) = q.shape, k_pages.shape
    b, pages = block_table.shape
    s = -(-len(q) // max(b, 1))
    return dict(b=b, s=s, t=max(0, pages * l - s), g=g, ratio=h // g, d=d, l=l, dtype=name_of(q.dtype))


@prefill_attention.costs
def _(b, s, t, g, ratio, d, l, dtype):
    size = getattr(torch, dtype).itemsize  # every sequence counted as long as the first
    return 4 * b * g * ratio * d * (s * t + s * (s + 1) // 2), b * g * d * (2 * s * (ratio + 1) + 2 * t) * size


@op
def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention of one new token per sequence to all cached tokens, its own (already written) included.

    q [b, h, d]; k_pages and v_pages [p, l, g, d]; block_table [b, pages] int32; lengths [b] int32 -> [b, h, d].
    A sequence of length 0 gets 0. Not checked: block_table names a page for every cached token.
    """
    keys, values = (
        [gather(pages, block_table[i], t).to(q.dtype) for i, t in enumerate(lengths.tolist())]
        for pages in (k_pages, v_pages)
    )
    out = [attend(q[i : i + 1], keys[i], values[i], scale) for i in range(len(q))]
    return torch.cat(out) if out else torch.empty_like(q)


@decode_attention.requires
def _(q, k_pages, v_pages, block_table, lengths, scale) -> None:
    sizes = axes(
        "decode_attention",
        q=(q, "b h d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        block_table=(block_table, "b pages"),
        lengths=(lengths, "b"),
    )
    check_heads("decode_attention", sizes)


@decode_attention.inputs
def _(
    b: Sizes(1, 4),
    t: Sizes(0, 100),
    g: Sizes(1, 3),
    ratio: RATIOS,
    d: HEAD_DIMS,
    l: PAGE_LENGTHS,
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    lengths = [t, *torch.randint(0, t + 1, (b - 1,), generator=rng).tolist()]
    k_pages, v_pages, block_table = draw_pages(lengths, l, g, d, dtype, rng, device)
    q = draw(b, g * ratio, d, dtype=dtype, rng=rng, device=device)
    return q, k_pages, v_pages, block_table, torch.tensor(lengths, device=device).int(), d**-0.5


decode_attention.result(lambda q, k_pages, v_pages, block_table, lengths, scale: q.new_empty(q.shape))


@decode_attention.sizes("b", "t")
def _(q, k_pages, v_pages, block_table, lengths, scale):
    """Lengths lie on the device, so t is what the block table has room for."""
    (b, h, d), (_, l, g, _) = q.shape, k_pages.shape
    return dict(b=b, t=block_table.shape[1] * l, g=g, ratio=h // g, d=d, l=l, dtype=name_of(q.dtype))


@decode_attention.costs
def _(b, t, g, ratio, d, l, dtype):
    return 4 * b * t * g * ratio * d, 2 * b * g * d * (t + ratio) * getattr(torch, dtype).itemsize


@op
def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of every position to every position of its picture: q, k and v [b, s, h, d] -> [b, s, h, d]."""
    scores = einsum(wide(q), wide(k), "b s h d, b t h d -> b h s t") * scale
    p = wide(scores.softmax(-1).to(v.dtype))
    return einsum(p, wide(v), "b h s t, b t h d -> b s h d").to(q.dtype)


@encoder_attention.requires
def _(q, k, v, scale) -> None:
    axes("encoder_attention", q=(q, "b s h d"), k=(k, "b s h d"), v=(v, "b s h d"))
    same_dtype("encoder_attention", q=q, k=k, v=v)


@encoder_attention.inputs
def _(
    b: Sizes(1, 3),
    s: Sizes(1, 90),
    h: Sizes(1, 3),
    d: HEAD_DIMS,
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    q, k, v = (draw(b, s, h, d, dtype=dtype, rng=rng, device=device) for _ in range(3))
    return q, k, v, d**-0.5


encoder_attention.result(lambda q, k, v, scale: q.new_empty(q.shape))


@encoder_attention.sizes("b")
def _(q, k, v, scale):
    b, s, h, d = q.shape
    return dict(b=b, s=s, h=h, d=d, dtype=name_of(q.dtype))


@encoder_attention.costs
def _(b, s, h, d, dtype):
    return 4 * b * h * d * s * s, 4 * b * s * h * d * getattr(torch, dtype).itemsize
