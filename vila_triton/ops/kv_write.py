"""The paged cache as tensors: how tokens lie in it, how they are read and written.

Token j of sequence i is row j % l of page block_table[i, j // l]; its slot is page · l + row.
"""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import OneOf, Sizes, op

from .dtypes import DTYPES, draw, name_of
from .indices import check_slots
from .kv_pages import BITS, Pages, QuantizedPages, check_pages, empty_pages, encode, leaves
from .shapes import axes, floating, of_dtype

PAGE_LENGTHS = OneOf(16, 32, 64, 128, 256)
KINDS = OneOf("plain", *BITS)  # of pools of pages; plain: in the dtype of the new tokens


def gather(pages: Pages, block_table: Tensor, length: int) -> Tensor:
    """The first `length` cached tokens of one sequence: pages [p, l, g, d], block_table [pages of it] -> [t, g, d].

    Quantised pages are read as the numbers they stand for, in float32.
    """
    named = block_table[: -(-length // pages.shape[1])]
    if isinstance(pages, QuantizedPages):
        return pages.map(lambda x: x.index_select(0, named).flatten(0, 1)[:length]).dense()
    return pages.index_select(0, named).flatten(0, 1)[:length]


def kind_of(pages: Pages) -> str:
    """As domains name it: "plain", "int8" or "int4"."""
    return "plain" if isinstance(pages, Tensor) else f"int{pages.bits}"


def bytes_of(tokens: int, d: int, dtype: str, kv: str) -> int:
    """Bytes of so many keys or values of one head; scales and zeros count as float32."""
    if kv == "plain":
        return tokens * d * getattr(torch, dtype).itemsize
    return tokens * (d * BITS[kv] // 8 + (8 if kv == "int4" else 4))


def draw_pages(
    lengths: list[int], l: int, g: int, d: int, dtype: str, rng: torch.Generator, device: str, kv: str = "plain"
) -> tuple[Pages, Pages, Tensor]:
    """Pages in which the given numbers of tokens are cached, in shuffled order: (k_pages, v_pages, block_table).

    All that no one may read (tails of pages, free pages, the last one, which unused table entries name) is NaN; of
    quantised pages the scales and zeros are.
    """
    counts = [-(-n // l) for n in lengths]
    order = torch.randperm(sum(counts) + 1, generator=rng).tolist()
    last = len(order)
    pages = torch.full((2, last + 1, l, g, d), float("nan"))
    block_table = torch.full((len(lengths), max(counts) + 1), last, dtype=torch.int32)
    for i, n in enumerate(lengths):
        for j in range(counts[i]):
            rows = min(l, n - j * l)
            block_table[i, j] = page = order.pop()
            pages[:, page, :rows] = torch.randn(2, rows, g, d, generator=rng)
    like = empty_pages((0, d), getattr(torch, dtype) if kv == "plain" else kv)
    k_pages, v_pages = (on(device, encode(x, like)) for x in pages)
    return k_pages, v_pages, block_table.to(device)


def on(device: str, pages: Pages) -> Pages:
    """The pages on another device."""
    return pages.to(device) if isinstance(pages, Tensor) else pages.map(lambda x: x.to(device))


@op(exact=True, batch_invariant=True)
def kv_write(k: Tensor, v: Tensor, k_pages: Pages, v_pages: Pages, slot_mapping: Tensor) -> tuple[Pages, Pages]:
    """Write new keys and values into their slots, in place, quantised as the pages are; returns the pages.

    k and v [s, g, d]; k_pages and v_pages [p, l, g, d]; slot_mapping [s] int64, each slot at most once; a slot below 0
    means that the token is not cached.
    """
    kept = slot_mapping >= 0
    page, row = slot_mapping[kept] // k_pages.shape[1], slot_mapping[kept] % k_pages.shape[1]
    for new, pages in ((k, k_pages), (v, v_pages)):
        for pool, values in zip(leaves(pages), leaves(encode(new[kept], pages))):
            pool[page, row] = values
    return k_pages, v_pages


@kv_write.requires
def _(k: Tensor, v: Tensor, k_pages: Pages, v_pages: Pages, slot_mapping: Tensor) -> None:
    check_write("kv_write", k, v, k_pages, v_pages, slot_mapping)


def check_write(where: str, k: Tensor, v: Tensor, k_pages: Pages, v_pages: Pages, slot_mapping: Tensor) -> None:
    axes(
        where,
        k=(k, "s g d"),
        v=(v, "s g d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        slot_mapping=(slot_mapping, "s"),
    )
    check_pages(where, k_pages, v_pages)
    floating(where, k=k, v=v)
    of_dtype(where, torch.int64, slot_mapping=slot_mapping)


@kv_write.bounds
def _(k: Tensor, v: Tensor, k_pages: Pages, v_pages: Pages, slot_mapping: Tensor) -> None:
    check_slots("kv_write", slot_mapping, *k_pages.shape[:2])


@kv_write.inputs
def _(
    s: Sizes(1, 40),
    g: Sizes(1, 3),
    d: OneOf(32, 16, 24, 64, 72, 80, 96, 128),
    l: PAGE_LENGTHS,
    dtype: DTYPES,
    kv: KINDS = "plain",
    *,
    rng: torch.Generator,
    device: str,
):
    """Random slots of a few pages, full of other tokens; about one token in eight is not cached."""
    pages = -(-s // l) + 1
    k, v = (draw(s, g, d, dtype=dtype, rng=rng, device=device) for _ in range(2))
    like = empty_pages((0, d), getattr(torch, dtype) if kv == "plain" else kv, device)
    held = [encode(draw(pages, l, g, d, dtype=dtype, rng=rng, device=device), like) for _ in range(2)]
    slots = torch.randperm(pages * l, generator=rng)[:s]
    slots[torch.rand(s, generator=rng) < 1 / 8] = -1
    return k, v, *held, slots.to(device)


kv_write.writes("k_pages", "v_pages")


@kv_write.sizes("s")
def _(k, v, k_pages, v_pages, slot_mapping):
    (s, g, d), l = k.shape, k_pages.shape[1]
    return dict(s=s, g=g, d=d, l=l, dtype=name_of(k.dtype), kv=kind_of(k_pages))


@kv_write.costs
def _(s, g, d, l, dtype, kv="plain"):
    return 0, 2 * s * g * (bytes_of(1, d, dtype, "plain") + bytes_of(1, d, dtype, kv)) + 8 * s
