"""The paged cache as tensors: how tokens lie in it, how they are read and written.

Token j of sequence i is row j % l of page block_table[i, j // l]; its slot is page · l + row.
"""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import OneOf, Sizes, op

from .domain import DTYPES, draw, name_of
from .shapes import axes, same_dtype

PAGE_LENGTHS = OneOf(16, 32, 64)


def gather(pages: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first `length` cached tokens of one sequence: pages [p, l, g, d], block_table [pages of it] -> [t, g, d]."""
    return pages.index_select(0, block_table[: -(-length // pages.shape[1])]).flatten(0, 1)[:length]


def draw_pages(
    lengths: list[int], l: int, g: int, d: int, dtype: str, rng: torch.Generator, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages in which the given numbers of tokens are cached, in shuffled order: (k_pages, v_pages, block_table).

    All that no one may read (tails of pages, free pages, the last one, which unused table entries name) is NaN.
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
    k_pages, v_pages = pages.to(device, getattr(torch, dtype))
    return k_pages, v_pages, block_table.to(device)


@op(exact=True)
def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
    """Write new keys and values into their slots, in place; returns the pages.

    k and v [s, g, d]; k_pages and v_pages [p, l, g, d]; slot_mapping [s] int64, each slot at most once; a slot below 0
    means that the token is not cached. Not checked (it would wait for the device): no slot is beyond the
    last page.
    """
    kept = slot_mapping >= 0
    page, row = slot_mapping[kept] // k_pages.shape[1], slot_mapping[kept] % k_pages.shape[1]
    k_pages[page, row] = k[kept].to(k_pages.dtype)
    v_pages[page, row] = v[kept].to(v_pages.dtype)
    return k_pages, v_pages


@kv_write.requires
def _(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    axes(
        "kv_write",
        k=(k, "s g d"),
        v=(v, "s g d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        slot_mapping=(slot_mapping, "s"),
    )
    same_dtype("kv_write", k_pages=k_pages, v_pages=v_pages)
    if slot_mapping.dtype != torch.int64:
        raise ValueError(f"kv_write: slot_mapping is {slot_mapping.dtype}, expected torch.int64")


@kv_write.inputs
def _(
    s: Sizes(1, 40),
    g: Sizes(1, 3),
    d: OneOf(32, 16, 24, 64, 72, 80, 96, 128),
    l: PAGE_LENGTHS,
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    """Random slots of a few pages; about one token in eight is not cached."""
    pages = -(-s // l) + 1
    k, v = (draw(s, g, d, dtype=dtype, rng=rng, device=device) for _ in range(2))
    k_pages, v_pages = (draw(pages, l, g, d, dtype=dtype, rng=rng, device=device) for _ in range(2))
    slots = torch.randperm(pages * l, generator=rng)[:s]
    slots[torch.rand(s, generator=rng) < 1 / 8] = -1
    return k, v, k_pages, v_pages, slots.to(device)


kv_write.writes("k_pages", "v_pages")


@kv_write.sizes("s")
def _(k, v, k_pages, v_pages, slot_mapping):
    (s, g, d), l = k.shape, k_pages.shape[1]
    return dict(s=s, g=g, d=d, l=l, dtype=name_of(k.dtype))


@kv_write.costs
def _(s, g, d, l, dtype):
    return 0, 4 * s * g * d * getattr(torch, dtype).itemsize + 8 * s
