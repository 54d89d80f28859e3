"""The paged cache as tensors: how tokens lie in it, how they are read and written.

Token j of sequence i is row j % l of page block_table[i, j // l]; its slot is page · l + row.
"""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import IntRange, OneOf, op

from .dtypes import DTYPES, dtype_name, random_tensor
from .indices import check_slot_mapping
from .kv_pages import KV_BITS, KVPages, QuantizedKVPages, check_pages, empty_kv_pages, page_tensors, quantize_kv
from .shapes import check_axes, check_dtype, check_floating

PAGE_SIZES = OneOf(16, 32, 64, 128, 256)
KV_FORMATS = OneOf("plain", *KV_BITS)  # of pools of pages; plain: in the dtype of the new tokens


def gather_tokens(pages: KVPages, block_table: Tensor, num_tokens: int) -> Tensor:
    """The first `length` cached tokens of one sequence: pages [p, l, g, d], block_table [pages of it] -> [t, g, d].

    Quantised pages are read as the numbers they stand for, in float32.
    """
    page_ids = block_table[: -(-num_tokens // pages.shape[1])]
    if isinstance(pages, QuantizedKVPages):
        return pages.map(lambda x: x.index_select(0, page_ids).flatten(0, 1)[:num_tokens]).dequantize()
    return pages.index_select(0, page_ids).flatten(0, 1)[:num_tokens]


def kv_format(pages: KVPages) -> str:
    """As domains name it: "plain", "int8" or "int4"."""
    return "plain" if isinstance(pages, Tensor) else f"int{pages.bits}"


def kv_bytes(tokens: int, d: int, dtype: str, kv: str) -> int:
    """Bytes of so many keys or values of one head; scales and zeros count as float32."""
    if kv == "plain":
        return tokens * d * getattr(torch, dtype).itemsize
    return tokens * (d * KV_BITS[kv] // 8 + (8 if kv == "int4" else 4))


def random_pages(
    seq_lens: list[int], l: int, g: int, d: int, dtype: str, rng: torch.Generator, device: str, kv: str = "plain"
) -> tuple[KVPages, KVPages, Tensor]:
    """Pages in which the given numbers of tokens are cached, in shuffled order: (k_pages, v_pages, block_table).

    All that no one may read (tails of pages, free pages, the last one, which unused table entries name) is NaN; of
    quantised pages the scales and zeros are.
    """
    page_counts = [-(-n // l) for n in seq_lens]
    free_pages = torch.randperm(sum(page_counts) + 1, generator=rng).tolist()
    unused_page = len(free_pages)
    pages = torch.full((2, unused_page + 1, l, g, d), float("nan"))
    block_table = torch.full((len(seq_lens), max(page_counts) + 1), unused_page, dtype=torch.int32)
    for i, n in enumerate(seq_lens):
        for j in range(page_counts[i]):
            num_rows = min(l, n - j * l)
            block_table[i, j] = page = free_pages.pop()
            pages[:, page, :num_rows] = torch.randn(2, num_rows, g, d, generator=rng)
    like = empty_kv_pages((0, d), getattr(torch, dtype) if kv == "plain" else kv)
    k_pages, v_pages = (to_device(device, quantize_kv(x, like)) for x in pages)
    return k_pages, v_pages, block_table.to(device)


def to_device(device: str, pages: KVPages) -> KVPages:
    """The pages on another device."""
    return pages.to(device) if isinstance(pages, Tensor) else pages.map(lambda x: x.to(device))


@op(bitwise_exact=True, batch_invariant=True)
def kv_write(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor) -> tuple[KVPages, KVPages]:
    """Write new keys and values into their slots, in place, quantised as the pages are; returns the pages.

    k and v [s, g, d]; k_pages and v_pages [p, l, g, d]; slot_mapping [s] int64, each slot at most once; a slot below 0
    means that the token is not cached.
    """
    is_cached = slot_mapping >= 0
    page, row = slot_mapping[is_cached] // k_pages.shape[1], slot_mapping[is_cached] % k_pages.shape[1]
    for new, pages in ((k, k_pages), (v, v_pages)):
        for page_tensor, values in zip(page_tensors(pages), page_tensors(quantize_kv(new[is_cached], pages))):
            page_tensor[page, row] = values
    return k_pages, v_pages


@kv_write.requires
def _(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor) -> None:
    check_kv_write_args("kv_write", k, v, k_pages, v_pages, slot_mapping)


def check_kv_write_args(
    op_name: str, k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor
) -> None:
    check_axes(
        op_name,
        k=(k, "s g d"),
        v=(v, "s g d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        slot_mapping=(slot_mapping, "s"),
    )
    check_pages(op_name, k_pages, v_pages)
    check_floating(op_name, k=k, v=v)
    check_dtype(op_name, torch.int64, slot_mapping=slot_mapping)


@kv_write.bounds
def _(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor) -> None:
    check_slot_mapping("kv_write", slot_mapping, *k_pages.shape[:2])


@kv_write.inputs
def _(
    s: IntRange(1, 40),
    g: IntRange(1, 3),
    d: OneOf(32, 16, 24, 64, 72, 80, 96, 128),
    l: PAGE_SIZES,
    dtype: DTYPES,
    kv: KV_FORMATS = "plain",
    *,
    rng: torch.Generator,
    device: str,
):
    """Random slots of a few pages, full of other tokens; about one token in eight is not cached."""
    pages = -(-s // l) + 1
    k, v = (random_tensor(s, g, d, dtype=dtype, rng=rng, device=device) for _ in range(2))
    like = empty_kv_pages((0, d), getattr(torch, dtype) if kv == "plain" else kv, device)
    held = [quantize_kv(random_tensor(pages, l, g, d, dtype=dtype, rng=rng, device=device), like) for _ in range(2)]
    slots = torch.randperm(pages * l, generator=rng)[:s]
    slots[torch.rand(s, generator=rng) < 1 / 8] = -1
    return k, v, *held, slots.to(device)


kv_write.writes("k_pages", "v_pages")


@kv_write.sizes("s")
def _(k, v, k_pages, v_pages, slot_mapping):
    (s, g, d), l = k.shape, k_pages.shape[1]
    return dict(s=s, g=g, d=d, l=l, dtype=dtype_name(k.dtype), kv=kv_format(k_pages))


@kv_write.costs
def _(s, g, d, l, dtype, kv="plain"):
    return 0, 2 * s * g * (kv_bytes(1, d, dtype, "plain") + kv_bytes(1, d, dtype, kv)) + 8 * s
