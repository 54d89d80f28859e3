"""Attention of a chunk of new tokens to the cached context of its sequence and to itself."""
# pyright: reportInvalidTypeForm=false

from functools import partial

import torch
from torch import Tensor

from vila_triton.registry import IntRange, op

from .attention import HEAD_DIMS, NUMERICS, QUERIES_PER_KV, RaggedBatch, causal_attention, check_heads, check_numerics
from .attention_cases import CHANGES, Change, change_cached_sequence
from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .indices import check_block_table, check_query_start_loc
from .kv_pages import KV_FORMATS, PAGE_SIZES, PagedKV, check_pages, kv_bytes, kv_format, random_pages
from .shapes import check_axes, check_dtype, check_finite, check_floating, check_same_dtype, check_type

EMPTY_PAGE_SIZE = 16  # of pages of which there are none


@op(batch_invariant=True)
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedKV,
    batch: RaggedBatch,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of new tokens to the cached context of their sequence and to the new tokens before them.

    q [s, h, d], k and v [s, g, d]: the new tokens of all sequences, as `batch` describes; `cache` holds the context.
    Query head i attends to KV head i // (h/g). Returns [s, h, d], and with `return_lse` also the log-sum-exp of the
    scores, [s, h]. The keys and values of the new tokens are taken from k and v, so it does not matter whether they
    have been written to the pages yet, nor whether the pages are quantized.

    Raises ValueError for shapes, dtypes or devices that do not fit, IndexError for pages or rows that do not exist.
    """
    out, lses = [q[:0]], [upcast(q.new_empty(0, q.shape[1]))]
    for i, t in enumerate(batch.context_lens.tolist()):
        rows = slice(*batch.query_start_loc[i : i + 2].tolist())
        keys, values = (torch.cat((x.to(new.dtype), new[rows])) for x, new in zip(cache.gather(i, t), (k, v)))
        seq_out, seq_lse = causal_attention(q[rows], keys, values, softmax_scale, numerics, return_lse)
        out.append(seq_out)
        lses += [] if seq_lse is None else [seq_lse]
    return (torch.cat(out), torch.cat(lses)) if return_lse else torch.cat(out)


def without_context(k: Tensor, query_start_loc: Tensor) -> tuple[PagedKV, RaggedBatch]:
    """The cache and the batch of whole sequences of which nothing is cached: k [s, g, d], query_start_loc [b+1]."""
    pages = k.new_empty(0, EMPTY_PAGE_SIZE, *k.shape[1:])
    cache = PagedKV(pages, pages, query_start_loc.new_empty(len(query_start_loc) - 1, 0))
    return cache, RaggedBatch(query_start_loc, torch.zeros_like(query_start_loc[:-1]))


@prefill_attention.requires
def _(q, k, v, cache, batch, softmax_scale, numerics="fast", return_lse=False) -> None:
    name = "prefill_attention"
    check_type(name, PagedKV, cache=cache)
    check_type(name, RaggedBatch, batch=batch)
    index_tensors = {"context_lens": (batch.context_lens, "b"), "block_table": (cache.block_table, "b pages")}
    index_tensors |= {"query_start_loc": (batch.query_start_loc, "b+1")}
    sizes = check_axes(
        name,
        q=(q, "s h d"),
        k=(k, "s g d"),
        v=(v, "s g d"),
        k_pages=(cache.k_pages, "p l g d"),
        v_pages=(cache.v_pages, "p l g d"),
        **index_tensors,
    )
    check_floating(name, q=q)
    check_same_dtype(name, q=q, k=k, v=v)
    check_finite(name, softmax_scale=softmax_scale)
    check_dtype(name, torch.int32, **{key: x for key, (x, _) in index_tensors.items()})
    check_pages(name, cache.k_pages, cache.v_pages)
    check_numerics(name, numerics)
    check_heads(name, sizes)
    if sizes["b+1"] != sizes["b"] + 1:
        raise ValueError(f"{name}: query_start_loc has {sizes['b+1']} entries for {sizes['b']} sequences")


@prefill_attention.bounds
def _(q, k, v, cache, batch, softmax_scale, numerics="fast", return_lse=False) -> None:
    check_query_start_loc("prefill_attention", batch.query_start_loc, len(q))
    shape = cache.k_pages.shape
    check_block_table("prefill_attention", cache.block_table, "context_lens", batch.context_lens, *shape[:2])


@prefill_attention.example_inputs
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
    cached = [t, *torch.randint(0, t + 1, (b - 1,), generator=rng).tolist()]
    cache = random_pages(cached, l, g, d, dtype, rng, device, kv)
    q, k, v = (random_tensor(sum(new), h, d, dtype=dtype, rng=rng, device=device) for h in (g * ratio, g, g))
    query_start_loc = torch.tensor([0, *new]).cumsum(0).to(device, torch.int32)
    batch = RaggedBatch(query_start_loc, torch.tensor(cached, device=device).int())
    return q, k, v, cache, batch, d**-0.5, *([] if numerics == "fast" else [numerics])


def _change_sequences(change: Change, args: tuple, rng: torch.Generator) -> tuple:
    q, k, v, cache, batch, *rest = args
    for i, t in enumerate(batch.context_lens.tolist()):
        rows = slice(*batch.query_start_loc[i : i + 2].tolist())
        q[rows], k[rows], v[rows] = change_cached_sequence(change, rng, q[rows], k[rows], v[rows], cache, i, t)
    return q, k, v, cache, batch, *rest


for _name, _change in CHANGES.items():
    prefill_attention.hard_case(_name)(partial(_change_sequences, _change))


@prefill_attention.hard_case("uneven_lengths")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Of every three sequences the second has no new tokens, and perhaps no others; the third has no context.

    The new tokens of the second are given to the first.
    """
    starts, context_lens = args[4].query_start_loc, args[4].context_lens
    starts[1:-1:3] = starts[2::3]
    context_lens[1::3] *= int(torch.randint(2, (), generator=rng))
    context_lens[2::3] = 0
    return args


@prefill_attention.fake_impl
def _(q, k, v, cache, batch, softmax_scale, numerics, return_lse):
    return (q.new_empty(q.shape), upcast(q.new_empty(q.shape[:2]))) if return_lse else q.new_empty(q.shape)


@prefill_attention.sizes_from_args("b", "s", "t")
def _(q, k, v, cache, batch, softmax_scale, numerics="fast", return_lse=False):
    """The lengths lie on the device, so s is their mean, and t what the block table has room for beside s."""
    (_, h, d), (_, l, g, _) = q.shape, cache.k_pages.shape
    b, pages = cache.block_table.shape
    s = -(-len(q) // max(b, 1))
    t, kv = max(0, pages * l - s), kv_format(cache.k_pages)
    return dict(b=b, s=s, t=t, g=g, ratio=h // g, d=d, l=l, dtype=dtype_name(q.dtype), kv=kv, numerics=numerics)


@prefill_attention.flops_and_bytes
def _(b, s, t, g, ratio, d, l, dtype, kv="plain", numerics="fast"):
    """Every sequence is counted as long as the first."""
    new, cached = kv_bytes(s, d, dtype, "plain"), kv_bytes(t, d, dtype, kv)
    return 4 * b * g * ratio * d * (s * t + s * (s + 1) // 2), 2 * b * g * ((ratio + 1) * new + cached)
