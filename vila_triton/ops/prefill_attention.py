"""Attention of a chunk of new tokens to the cached history of its sequence and to itself."""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import Sizes, op

from .attention import HEAD_DIMS, POLICIES, RATIOS, attend_last, check_heads, check_policy
from .dtypes import DTYPES, draw, name_of, wide
from .indices import check_cached, check_starts
from .kv_pages import Pages, check_pages
from .kv_write import KINDS, PAGE_LENGTHS, bytes_of, draw_pages, gather, kind_of
from .shapes import axes, finite, floating, of_dtype, same_dtype


@op(batch_invariant=True)
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    block_table: Tensor,
    query_start: Tensor,
    history: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of a chunk of new tokens to the cached history of its sequence and to itself.

    q [s, h, d], k and v [s, g, d] the new tokens; k_pages and v_pages [p, l, g, d]; block_table [b, pages] int32;
    query_start [b+1] int32; history [b] int32 cached tokens before the chunk -> [s, h, d], or with `lse` (that,
    [s, h]). The chunk's own keys and values are taken from k and v, so it does not matter whether they have been
    written to the pages yet, nor whether pages are quantised.
    """
    out, sums = [q[:0]], [wide(q.new_empty(0, q.shape[1]))]
    for i, t in enumerate(history.tolist()):
        rows = slice(*query_start[i : i + 2].tolist())
        keys, values = (
            torch.cat((gather(pages, block_table[i], t).to(new.dtype), new[rows]))
            for pages, new in ((k_pages, k), (v_pages, v))
        )
        rows_out, row_sums = attend_last(q[rows], keys, values, scale, policy, lse)
        out.append(rows_out)
        sums += [] if row_sums is None else [row_sums]
    return (torch.cat(out), torch.cat(sums)) if lse else torch.cat(out)


@prefill_attention.requires
def _(q, k, v, k_pages, v_pages, block_table, query_start, history, scale, policy="fast", lse=False) -> None:
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
    floating("prefill_attention", q=q)
    same_dtype("prefill_attention", q=q, k=k, v=v)
    finite("prefill_attention", scale=scale)
    of_dtype("prefill_attention", torch.int32, block_table=block_table, query_start=query_start, history=history)
    check_pages("prefill_attention", k_pages, v_pages)
    check_policy("prefill_attention", policy)
    check_heads("prefill_attention", sizes)
    if sizes["b+1"] != sizes["b"] + 1:
        raise ValueError(f"prefill_attention: query_start has {sizes['b+1']} entries for {sizes['b']} sequences")


@prefill_attention.bounds
def _(q, k, v, k_pages, v_pages, block_table, query_start, history, scale, policy="fast", lse=False) -> None:
    check_starts("prefill_attention", query_start, len(q))
    check_cached("prefill_attention", block_table, "history", history, *k_pages.shape[:2])


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
    kv: KINDS = "plain",
    policy: POLICIES = "fast",
    *,
    rng: torch.Generator,
    device: str,
):
    """The first sequence has s new tokens after t cached ones; the others fewer, none included."""
    new = [s, *torch.randint(0, s + 1, (b - 1,), generator=rng).tolist()]
    history = [t, *torch.randint(0, t + 1, (b - 1,), generator=rng).tolist()]
    k_pages, v_pages, block_table = draw_pages(history, l, g, d, dtype, rng, device, kv)
    q, k, v = (draw(sum(new), h, d, dtype=dtype, rng=rng, device=device) for h in (g * ratio, g, g))
    query_start = torch.tensor([0, *new]).cumsum(0).to(device, torch.int32)
    past = (block_table, query_start, torch.tensor(history, device=device).int())
    return q, k, v, k_pages, v_pages, *past, d**-0.5, *([] if policy == "fast" else [policy])


prefill_attention.result(
    lambda q, k, v, k_pages, v_pages, block_table, query_start, history, scale, policy, lse: q.new_empty(q.shape)
)


@prefill_attention.sizes("b", "s", "t")
def _(q, k, v, k_pages, v_pages, block_table, query_start, history, scale, policy="fast", lse=False):
    """Lengths lie on the device, so s is their mean, and t what the block table has room for beside s."""
    (_, h, d), (_, l, g, _) = q.shape, k_pages.shape
    b, pages = block_table.shape
    s = -(-len(q) // max(b, 1))
    t, kv = max(0, pages * l - s), kind_of(k_pages)
    return dict(b=b, s=s, t=t, g=g, ratio=h // g, d=d, l=l, dtype=name_of(q.dtype), kv=kv, policy=policy)


@prefill_attention.costs
def _(b, s, t, g, ratio, d, l, dtype, kv="plain", policy="fast"):
    """Every sequence counted as long as the first."""
    new, old = bytes_of(s, d, dtype, "plain"), bytes_of(t, d, dtype, kv)
    return 4 * b * g * ratio * d * (s * t + s * (s + 1) // 2), 2 * b * g * ((ratio + 1) * new + old)
