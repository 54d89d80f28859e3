"""Attention of one new token of each sequence to all of its cached tokens."""
# pyright: reportInvalidTypeForm=false

from functools import partial

import torch
from torch import Tensor

from vila_triton.registry import IntRange, op

from .attention import HEAD_DIMS, NUMERICS, QUERIES_PER_KV, causal_attention, check_heads, check_numerics
from .attention_cases import CHANGES, Change, change_cached_sequence
from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .indices import check_block_table
from .kv_pages import KV_FORMATS, PAGE_SIZES, PagedKV, check_pages, kv_bytes, kv_format, random_pages
from .shapes import check_axes, check_dtype, check_finite, check_floating, check_type


@op(batch_invariant=True)
def decode_attention(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one new token per sequence to all cached tokens of its sequence, its own among them.

    q [b, h, d]; `cache` holds the tokens; seq_lens [b] int32: how many each sequence has. Query head i attends to KV
    head i // (h/g). Returns [b, h, d], and with `return_lse` also the log-sum-exp of the scores, [b, h]. A sequence of
    length 0 gets 0 and -inf.

    Raises ValueError for shapes, dtypes or devices that do not fit, IndexError for pages that do not exist.
    """
    keys_and_values = [cache.gather(i, t) for i, t in enumerate(seq_lens.tolist())]
    rows = [
        causal_attention(q[i : i + 1], k.to(q.dtype), v.to(q.dtype), softmax_scale, numerics, return_lse)
        for i, (k, v) in enumerate(keys_and_values)
    ]
    out = torch.cat([q[:0], *(out for out, _ in rows)])
    return (out, torch.cat([upcast(q[:0, :, 0]), *(x for _, x in rows if x is not None)])) if return_lse else out


@decode_attention.requires
def _(q, cache, seq_lens, softmax_scale, numerics="fast", return_lse=False) -> None:
    name = "decode_attention"
    check_type(name, PagedKV, cache=cache)
    sizes = check_axes(
        name,
        q=(q, "b h d"),
        k_pages=(cache.k_pages, "p l g d"),
        v_pages=(cache.v_pages, "p l g d"),
        block_table=(cache.block_table, "b pages"),
        seq_lens=(seq_lens, "b"),
    )
    check_floating(name, q=q)
    check_finite(name, softmax_scale=softmax_scale)
    check_dtype(name, torch.int32, block_table=cache.block_table, seq_lens=seq_lens)
    check_pages(name, cache.k_pages, cache.v_pages)
    check_numerics(name, numerics)
    check_heads(name, sizes)


@decode_attention.bounds
def _(q, cache, seq_lens, softmax_scale, numerics="fast", return_lse=False) -> None:
    check_block_table("decode_attention", cache.block_table, "seq_lens", seq_lens, *cache.k_pages.shape[:2])


@decode_attention.example_inputs
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
    cache = random_pages(seq_lens, l, g, d, dtype, rng, device, kv)
    q = random_tensor(b, g * ratio, d, dtype=dtype, rng=rng, device=device)
    return q, cache, torch.tensor(seq_lens, device=device).int(), d**-0.5, *([] if numerics == "fast" else [numerics])


def _change_sequences(change: Change, args: tuple, rng: torch.Generator) -> tuple:
    q, cache, seq_lens, *rest = args
    no_new_tokens = q.new_empty(0, *cache.k_pages.shape[2:])
    for i, t in enumerate(seq_lens.tolist()):
        q[i : i + 1], _, _ = change_cached_sequence(
            change, rng, q[i : i + 1], no_new_tokens, no_new_tokens, cache, i, t
        )
    return q, cache, seq_lens, *rest


for _name, _change in CHANGES.items():
    decode_attention.hard_case(_name)(partial(_change_sequences, _change))


@decode_attention.hard_case("uneven_lengths")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Of every three sequences the second is empty, and the third has one token at most."""
    q, cache, seq_lens, *rest = args
    seq_lens[1::3] = 0
    seq_lens[2::3].clamp_(max=1)
    return q, cache, seq_lens, *rest


@decode_attention.fake_impl
def _(q, cache, seq_lens, softmax_scale, numerics, return_lse):
    return (q.new_empty(q.shape), upcast(q.new_empty(q.shape[:2]))) if return_lse else q.new_empty(q.shape)


decode_attention.no_gradient("keys and values in the KV cache have none, so it would not be that of the whole")


@decode_attention.sizes_from_args("b", "t")
def _(q, cache, seq_lens, softmax_scale, numerics="fast", return_lse=False):
    """The lengths lie on the device, so t is what the block table has room for."""
    (b, h, d), (_, l, g, _) = q.shape, cache.k_pages.shape
    t, kv = cache.block_table.shape[1] * l, kv_format(cache.k_pages)
    return dict(b=b, t=t, g=g, ratio=h // g, d=d, l=l, dtype=dtype_name(q.dtype), kv=kv, numerics=numerics)


@decode_attention.flops_and_bytes
def _(b, t, g, ratio, d, l, dtype, kv="plain", numerics="fast"):
    moved = kv_bytes(t, d, dtype, kv) + kv_bytes(ratio, d, dtype, "plain")
    return 4 * b * t * g * ratio * d, 2 * b * g * moved
