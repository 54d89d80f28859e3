"""Attention of one new token a sequence to all that is cached."""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import Sizes, op

from .attention import HEAD_DIMS, POLICIES, RATIOS, attend_last, check_heads, check_policy
from .dtypes import DTYPES, draw, name_of, wide
from .indices import check_cached
from .kv_pages import Pages, check_pages
from .kv_write import KINDS, PAGE_LENGTHS, bytes_of, draw_pages, gather, kind_of
from .shapes import axes, finite, floating, of_dtype


@op(batch_invariant=True)
def decode_attention(
    q: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one new token per sequence to all cached tokens, its own (already written) included.

    q [b, h, d]; k_pages and v_pages [p, l, g, d]; block_table [b, pages] int32; lengths [b] int32 -> [b, h, d],
    or with `lse` (that, [b, h]). A sequence of length 0 gets 0 and -inf.
    """
    keys, values = (
        [gather(pages, block_table[i], t).to(q.dtype) for i, t in enumerate(lengths.tolist())]
        for pages in (k_pages, v_pages)
    )
    rows = [attend_last(q[i : i + 1], keys[i], values[i], scale, policy, lse) for i in range(len(q))]
    out = torch.cat([q[:0], *(out for out, _ in rows)])
    return (out, torch.cat([wide(q[:0, :, 0]), *(x for _, x in rows if x is not None)])) if lse else out


@decode_attention.requires
def _(q, k_pages, v_pages, block_table, lengths, scale, policy="fast", lse=False) -> None:
    sizes = axes(
        "decode_attention",
        q=(q, "b h d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        block_table=(block_table, "b pages"),
        lengths=(lengths, "b"),
    )
    floating("decode_attention", q=q)
    finite("decode_attention", scale=scale)
    of_dtype("decode_attention", torch.int32, block_table=block_table, lengths=lengths)
    check_pages("decode_attention", k_pages, v_pages)
    check_policy("decode_attention", policy)
    check_heads("decode_attention", sizes)


@decode_attention.bounds
def _(q, k_pages, v_pages, block_table, lengths, scale, policy="fast", lse=False) -> None:
    check_cached("decode_attention", block_table, "lengths", lengths, *k_pages.shape[:2])


@decode_attention.inputs
def _(
    b: Sizes(1, 4),
    t: Sizes(0, 100),
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
    lengths = [t, *torch.randint(0, t + 1, (b - 1,), generator=rng).tolist()]
    k_pages, v_pages, block_table = draw_pages(lengths, l, g, d, dtype, rng, device, kv)
    q = draw(b, g * ratio, d, dtype=dtype, rng=rng, device=device)
    cached = (k_pages, v_pages, block_table, torch.tensor(lengths, device=device).int())
    return q, *cached, d**-0.5, *([] if policy == "fast" else [policy])


decode_attention.result(lambda q, k_pages, v_pages, block_table, lengths, scale, policy, lse: q.new_empty(q.shape))


@decode_attention.sizes("b", "t")
def _(q, k_pages, v_pages, block_table, lengths, scale, policy="fast", lse=False):
    """Lengths lie on the device, so t is what the block table has room for."""
    (b, h, d), (_, l, g, _) = q.shape, k_pages.shape
    t, kv = block_table.shape[1] * l, kind_of(k_pages)
    return dict(b=b, t=t, g=g, ratio=h // g, d=d, l=l, dtype=name_of(q.dtype), kv=kv, policy=policy)


@decode_attention.costs
def _(b, t, g, ratio, d, l, dtype, kv="plain", policy="fast"):
    moved = bytes_of(t, d, dtype, kv) + bytes_of(ratio, d, dtype, "plain")
    return 4 * b * t * g * ratio * d, 2 * b * g * moved
