"""Attention of one new token a sequence to all that is cached."""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import IntRange, op

from .attention import HEAD_DIMS, NUMERICS, QUERIES_PER_KV, causal_attention, check_heads, check_numerics
from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .indices import check_block_table
from .kv_pages import KVPages, check_pages
from .kv_write import KV_FORMATS, PAGE_SIZES, gather_tokens, kv_bytes, kv_format, random_pages
from .shapes import check_axes, check_dtype, check_finite, check_floating


@op(batch_invariant=True)
def decode_attention(
    q: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one new token per sequence to all cached tokens, its own (already written) included.

    q [b, h, d]; k_pages and v_pages [p, l, g, d]; block_table [b, pages] int32; seq_lens [b] int32 -> [b, h, d],
    or with `lse` (that, [b, h]). A sequence of length 0 gets 0 and -inf.
    """
    keys, values = (
        [gather_tokens(pages, block_table[i], t).to(q.dtype) for i, t in enumerate(seq_lens.tolist())]
        for pages in (k_pages, v_pages)
    )
    rows = [
        causal_attention(q[i : i + 1], keys[i], values[i], softmax_scale, numerics, return_lse) for i in range(len(q))
    ]
    out = torch.cat([q[:0], *(out for out, _ in rows)])
    return (out, torch.cat([upcast(q[:0, :, 0]), *(x for _, x in rows if x is not None)])) if return_lse else out


@decode_attention.requires
def _(q, k_pages, v_pages, block_table, seq_lens, softmax_scale, numerics="fast", return_lse=False) -> None:
    sizes = check_axes(
        "decode_attention",
        q=(q, "b h d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        block_table=(block_table, "b pages"),
        seq_lens=(seq_lens, "b"),
    )
    check_floating("decode_attention", q=q)
    check_finite("decode_attention", softmax_scale=softmax_scale)
    check_dtype("decode_attention", torch.int32, block_table=block_table, seq_lens=seq_lens)
    check_pages("decode_attention", k_pages, v_pages)
    check_numerics("decode_attention", numerics)
    check_heads("decode_attention", sizes)


@decode_attention.bounds
def _(q, k_pages, v_pages, block_table, seq_lens, softmax_scale, numerics="fast", return_lse=False) -> None:
    check_block_table("decode_attention", block_table, "seq_lens", seq_lens, *k_pages.shape[:2])


@decode_attention.inputs
def _(
    b: IntRange(1, 4),
    t: IntRange(0, 100),
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
    seq_lens = [t, *torch.randint(0, t + 1, (b - 1,), generator=rng).tolist()]
    k_pages, v_pages, block_table = random_pages(seq_lens, l, g, d, dtype, rng, device, kv)
    q = random_tensor(b, g * ratio, d, dtype=dtype, rng=rng, device=device)
    cached = (k_pages, v_pages, block_table, torch.tensor(seq_lens, device=device).int())
    return q, *cached, d**-0.5, *([] if numerics == "fast" else [numerics])


decode_attention.result(
    lambda q, k_pages, v_pages, block_table, seq_lens, softmax_scale, numerics, lse: q.new_empty(q.shape)
)


@decode_attention.sizes("b", "t")
def _(q, k_pages, v_pages, block_table, seq_lens, softmax_scale, numerics="fast", return_lse=False):
    """Lengths lie on the device, so t is what the block table has room for."""
    (b, h, d), (_, l, g, _) = q.shape, k_pages.shape
    t, kv = block_table.shape[1] * l, kv_format(k_pages)
    return dict(b=b, t=t, g=g, ratio=h // g, d=d, l=l, dtype=dtype_name(q.dtype), kv=kv, numerics=numerics)


@decode_attention.costs
def _(b, t, g, ratio, d, l, dtype, kv="plain", numerics="fast"):
    moved = kv_bytes(t, d, dtype, kv) + kv_bytes(ratio, d, dtype, "plain")
    return 4 * b * t * g * ratio * d, 2 * b * g * moved
