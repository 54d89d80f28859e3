"""Attention of a chunk of new tokens to the cached context_lens of its sequence and to itself."""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import IntRange, op

from .attention import HEAD_DIMS, NUMERICS, QUERIES_PER_KV, causal_attention, check_heads, check_numerics
from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .indices import check_block_table, check_query_start_loc
from .kv_pages import KVPages, check_pages
from .kv_write import KV_FORMATS, PAGE_SIZES, gather_tokens, kv_bytes, kv_format, random_pages
from .shapes import check_axes, check_dtype, check_finite, check_floating, check_same_dtype


@op(batch_invariant=True)
def prefill_attention(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of a chunk of new tokens to the cached context_lens of its sequence and to itself.

    q [s, h, d], k and v [s, g, d] the new tokens; k_pages and v_pages [p, l, g, d]; block_table [b, pages] int32;
    query_start_loc [b+1] int32; context_lens [b] int32 cached tokens before the chunk -> [s, h, d], or with `lse` (that,
    [s, h]). The chunk's own keys and values are taken from k and v, so it does not matter whether they have been
    written to the pages yet, nor whether pages are quantised.
    """
    out, lses = [q[:0]], [upcast(q.new_empty(0, q.shape[1]))]
    for i, t in enumerate(context_lens.tolist()):
        rows = slice(*query_start_loc[i : i + 2].tolist())
        keys, values = (
            torch.cat((gather_tokens(pages, block_table[i], t).to(new.dtype), new[rows]))
            for pages, new in ((k_pages, k), (v_pages, v))
        )
        seq_out, seq_lse = causal_attention(q[rows], keys, values, softmax_scale, numerics, return_lse)
        out.append(seq_out)
        lses += [] if seq_lse is None else [seq_lse]
    return (torch.cat(out), torch.cat(lses)) if return_lse else torch.cat(out)


@prefill_attention.requires
def _(
    q,
    k,
    v,
    k_pages,
    v_pages,
    block_table,
    query_start_loc,
    context_lens,
    softmax_scale,
    numerics="fast",
    return_lse=False,
) -> None:
    sizes = check_axes(
        "prefill_attention",
        q=(q, "s h d"),
        k=(k, "s g d"),
        v=(v, "s g d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        context_lens=(context_lens, "b"),
        block_table=(block_table, "b pages"),
        query_start_loc=(query_start_loc, "b+1"),
    )
    check_floating("prefill_attention", q=q)
    check_same_dtype("prefill_attention", q=q, k=k, v=v)
    check_finite("prefill_attention", softmax_scale=softmax_scale)
    check_dtype(
        "prefill_attention",
        torch.int32,
        block_table=block_table,
        query_start_loc=query_start_loc,
        context_lens=context_lens,
    )
    check_pages("prefill_attention", k_pages, v_pages)
    check_numerics("prefill_attention", numerics)
    check_heads("prefill_attention", sizes)
    if sizes["b+1"] != sizes["b"] + 1:
        raise ValueError(f"prefill_attention: query_start_loc has {sizes['b+1']} entries for {sizes['b']} sequences")


@prefill_attention.bounds
def _(
    q,
    k,
    v,
    k_pages,
    v_pages,
    block_table,
    query_start_loc,
    context_lens,
    softmax_scale,
    numerics="fast",
    return_lse=False,
) -> None:
    check_query_start_loc("prefill_attention", query_start_loc, len(q))
    check_block_table("prefill_attention", block_table, "context_lens", context_lens, *k_pages.shape[:2])


@prefill_attention.inputs
def _(
    b: IntRange(1, 3),
    s: IntRange(1, 40),
    t: IntRange(0, 70),
    g: IntRange(1, 3),
    ratio: QUERIES_PER_KV,
    d: HEAD_DIMS,
    l: PAGE_SIZES,
    dtype: DTYPES,
    kv: KV_FORMATS = "plain",
    numerics: NUMERICS = "fast",
    *,
    rng: torch.Generator,
    device: str,
):
    """The first sequence has s new tokens after t cached ones; the others fewer, none included."""
    new = [s, *torch.randint(0, s + 1, (b - 1,), generator=rng).tolist()]
    context_lens = [t, *torch.randint(0, t + 1, (b - 1,), generator=rng).tolist()]
    k_pages, v_pages, block_table = random_pages(context_lens, l, g, d, dtype, rng, device, kv)
    q, k, v = (random_tensor(sum(new), h, d, dtype=dtype, rng=rng, device=device) for h in (g * ratio, g, g))
    query_start_loc = torch.tensor([0, *new]).cumsum(0).to(device, torch.int32)
    past = (block_table, query_start_loc, torch.tensor(context_lens, device=device).int())
    return q, k, v, k_pages, v_pages, *past, d**-0.5, *([] if numerics == "fast" else [numerics])


prefill_attention.result(
    lambda q, k, v, k_pages, v_pages, block_table, query_start_loc, context_lens, softmax_scale, numerics, lse: (
        q.new_empty(q.shape)
    )
)


@prefill_attention.sizes("b", "s", "t")
def _(
    q,
    k,
    v,
    k_pages,
    v_pages,
    block_table,
    query_start_loc,
    context_lens,
    softmax_scale,
    numerics="fast",
    return_lse=False,
):
    """Lengths lie on the device, so s is their mean, and t what the block table has room for beside s."""
    (_, h, d), (_, l, g, _) = q.shape, k_pages.shape
    b, pages = block_table.shape
    s = -(-len(q) // max(b, 1))
    t, kv = max(0, pages * l - s), kv_format(k_pages)
    return dict(b=b, s=s, t=t, g=g, ratio=h // g, d=d, l=l, dtype=dtype_name(q.dtype), kv=kv, numerics=numerics)


@prefill_attention.costs
def _(b, s, t, g, ratio, d, l, dtype, kv="plain", numerics="fast"):
    """Every sequence counted as long as the first."""
    new, old = kv_bytes(s, d, dtype, "plain"), kv_bytes(t, d, dtype, kv)
    return 4 * b * g * ratio * d * (s * t + s * (s + 1) // 2), 2 * b * g * ((ratio + 1) * new + old)
