"""The paged KV cache: what its pages are made of, where tokens lie in them, and random ones for examples.

Token j of sequence i is row j % l of page block_table[i, j // l], where l is the page size; its slot is page · l + row.

Pages of keys or of values are either plain, a tensor [p, l, g, d] of any dtype, or quantized, `QuantizedKVPages`. Axes
before p, such as the layer, are allowed where pages are made and indexed (`empty_kv_pages`, `pages[layer]`); ops take
one layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vila_triton.registry import OneOf

from .dtypes import upcast
from .shapes import check_axes

PAGE_SIZES = OneOf(16, 24, 32, 48, 64, 96, 128, 160, 256)
KV_BITS = {"int8": 8, "int4": 4}
KV_FORMATS = OneOf("plain", *KV_BITS)  # plain: in the dtype of the new tokens
SCALE_DTYPES = (torch.float32, torch.float16, torch.float64)  # float64: for the oracles of tests


@dataclass(frozen=True)
class QuantizedKVPages:
    """Pages in 8 or 4 bits: x[p, l, g, j] = (code[p, l, g, j] - zeros[p, l, g]) * scales[p, l, g].

    values   [p, l, g, d] int8, codes -127 to 127; or [p, l, g, d/2] uint8, codes 0 to 15: byte j of a head holds code
             j in its low four bits and code j + d/2 in its high four
    scales   [p, l, g] float32 or float16, above 0
    zeros    None with 8 bits; with 4 the code that stands for 0, [p, l, g] whole numbers 0 to 15 in the dtype of scales

    A head that held NaN or infinity has codes 0, and NaN for its scale and zero: it is read as NaN.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def bits(self) -> int:
        return 8 if self.zeros is None else 4

    @property
    def shape(self) -> torch.Size:
        """[p, l, g, d], the shape of the dequantized pages."""
        *outer, width = self.values.shape
        return torch.Size((*outer, width * 8 // self.bits))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in page_tensors(self))

    def map(self, fn: Callable[[Tensor], Tensor]) -> "QuantizedKVPages":
        """Apply fn to each tensor."""
        return QuantizedKVPages(fn(self.values), fn(self.scales), None if self.zeros is None else fn(self.zeros))

    def __getitem__(self, index: Any) -> "QuantizedKVPages":
        """Index the axes that all tensors have: every axis but d."""
        return self.map(lambda x: x[index])

    def dequantize(self) -> Tensor:
        """The pages as a plain tensor [p, l, g, d] in float32, or in float64 if the scales are."""
        scales, codes = upcast(self.scales), self.values
        if self.zeros is None:
            return codes.to(scales.dtype) * scales[..., None]
        codes = torch.cat((codes & 15, codes >> 4), -1).to(scales.dtype)  # [..., d/2] bytes -> [..., d]
        return (codes - upcast(self.zeros)[..., None]) * scales[..., None]


KVPages = Tensor | QuantizedKVPages


@dataclass(frozen=True)
class PagedKV:
    """The cached keys and values of one layer, and which pages belong to which sequence.

    k_pages, v_pages   [p, l, g, d], both plain or both quantized alike
    block_table        [b, pages] int32: the pages of each sequence in order; entries beyond its tokens may be anything
    """

    k_pages: KVPages
    v_pages: KVPages
    block_table: Tensor

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[1]

    def gather(self, sequence: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first `num_tokens` cached keys and values of a sequence, [t, g, d] each; in float32 if quantized."""
        page_ids = self.block_table[sequence]
        return gather_tokens(self.k_pages, page_ids, num_tokens), gather_tokens(self.v_pages, page_ids, num_tokens)


def page_tensors(pages: KVPages) -> list[Tensor]:
    """The tensors that pages consist of; all of them have the axes of the pages but, with scales and zeros, d."""
    if isinstance(pages, Tensor):
        return [pages]
    return [x for x in (pages.values, pages.scales, pages.zeros) if x is not None]


def empty_kv_pages(
    shape: tuple[int, ...],
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    scale_dtype: torch.dtype = torch.float32,
) -> KVPages:
    """Uninitialized pages of shape [..., p, l, g, d].

    dtype: that of plain pages, or "int8" or "int4" for quantized ones, whose scales are of `scale_dtype`. Raises
    ValueError for another name, or an odd d in 4 bits.
    """
    if isinstance(dtype, torch.dtype):
        return torch.empty(shape, dtype=dtype, device=device)
    if dtype not in KV_BITS:
        raise ValueError(f"no pages in {dtype!r}; there are: {', '.join(KV_BITS)}, and dtypes of torch")
    *outer, d = shape
    if dtype == "int4" and d % 2:
        raise ValueError(f"pages in int4 need an even head dim, got {d}")
    value_dtype, width = (torch.int8, d) if dtype == "int8" else (torch.uint8, d // 2)
    scales, zeros = (torch.empty(outer, dtype=scale_dtype, device=device) for _ in range(2))
    return QuantizedKVPages(
        torch.empty(*outer, width, dtype=value_dtype, device=device), scales, zeros if dtype == "int4" else None
    )


def quantize_kv(x: Tensor, like: KVPages) -> KVPages:
    """Keys or values x [..., d] in the format of the pages `like`: a tensor [..., d], or codes with scales [...].

    8 bits: the largest |x| of a token and head is code 127. 4 bits: the 16 codes span its values and 0, which is one of
    them. A scale is rounded to its dtype first, and is a normal number at least, so that a value is at most half a
    scale off, and at the ends of the range 127 (or 15) roundings of the scale more. Halves are rounded up.

    Scales are products with a rounded reciprocal: torch divides by a Python number in that way on a GPU, but not on a
    CPU, while a product has the same bits everywhere. Codes are quotients of tensors, which are true ones everywhere.
    """
    if isinstance(like, Tensor):
        return x.to(like.dtype)
    x, dtype = upcast(x), like.scales.dtype
    min_scale = torch.finfo(dtype).smallest_normal
    is_finite = x.isfinite().all(-1)
    x = torch.where(is_finite[..., None], x, 0.0)
    if like.zeros is None:
        scales = (x.abs().amax(-1) * (1 / 127)).clamp(min=min_scale).to(dtype)
        codes = torch.floor(x / scales[..., None].to(x.dtype) + 0.5).clamp(-127, 127)
        return QuantizedKVPages(codes.to(torch.int8), scales.masked_fill(~is_finite, math.nan))
    lowest, highest = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scales = ((highest - lowest) * (1 / 15)).clamp(min=min_scale).to(dtype)
    step = scales.to(x.dtype)
    zeros = torch.floor(-lowest / step + 0.5).clamp(0, 15)
    codes = (torch.floor(x / step[..., None] + 0.5) + zeros[..., None]).clamp(0, 15).to(torch.uint8)
    low_codes, high_codes = codes.chunk(2, -1)
    values = low_codes | high_codes << 4
    return QuantizedKVPages(values, *(y.to(dtype).masked_fill(~is_finite, math.nan) for y in (scales, zeros)))


def write_tokens(new: Tensor, pages: KVPages, slots: Tensor) -> None:
    """Write keys or values [s, g, d] into the slots [s] of pages, in place, quantized as these are."""
    page, row = slots // pages.shape[1], slots % pages.shape[1]
    for page_tensor, values in zip(page_tensors(pages), page_tensors(quantize_kv(new, pages))):
        page_tensor[page, row] = values


def check_pages(op_name: str, k_pages: KVPages, v_pages: KVPages) -> None:
    """ValueError unless both have one format and, if quantized, the tensors that `QuantizedKVPages` describes."""
    formats = []
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if isinstance(pages, Tensor):
            formats.append(str(pages.dtype))
            continue
        formats.append(f"int{pages.bits} with scales in {pages.scales.dtype}")
        fields = [("values", "p l g d"), ("scales", "p l g"), ("zeros", "p l g")][: len(page_tensors(pages))]
        check_axes(op_name, **{f"{name}.{part}": (getattr(pages, part), pattern) for part, pattern in fields})
        expected = torch.int8 if pages.bits == 8 else torch.uint8
        if pages.values.dtype != expected:
            raise ValueError(
                f"{op_name}: {name}.values is {pages.values.dtype}, expected {expected} in {pages.bits} bits"
            )
        if any(x.dtype != pages.scales.dtype or x.dtype not in SCALE_DTYPES for x in page_tensors(pages)[1:]):
            dtypes = " and ".join(str(x.dtype) for x in page_tensors(pages)[1:])
            raise ValueError(
                f"{op_name}: scales and zeros of {name} are {dtypes}, expected both float32 or both float16"
            )
    if formats[0] != formats[1]:
        raise ValueError(f"{op_name}: v_pages is {formats[1]}, expected {formats[0]} like k_pages")


def gather_tokens(pages: KVPages, page_ids: Tensor, num_tokens: int) -> Tensor:
    """The first `num_tokens` cached tokens of a sequence, [t, g, d]; dequantized to float32 if pages are quantized.

    page_ids [n] int32: its row of the block table.
    """
    page_ids = page_ids[: -(-num_tokens // pages.shape[1])]
    if isinstance(pages, QuantizedKVPages):
        return pages.map(lambda x: x.index_select(0, page_ids).flatten(0, 1)[:num_tokens]).dequantize()
    return pages.index_select(0, page_ids).flatten(0, 1)[:num_tokens]


def kv_format(pages: KVPages) -> str:
    """The name of the format of pages, as domains have it: "plain", "int8" or "int4"."""
    return "plain" if isinstance(pages, Tensor) else f"int{pages.bits}"


def kv_bytes(tokens: int, d: int, dtype: str, kv: str) -> int:
    """Bytes of so many keys or values of one head; scales and zeros count as float32."""
    if kv == "plain":
        return tokens * d * getattr(torch, dtype).itemsize
    return tokens * (d * KV_BITS[kv] // 8 + (8 if kv == "int4" else 4))


def random_pages(
    seq_lens: list[int], l: int, g: int, d: int, dtype: str, rng: torch.Generator, device: str, kv: str = "plain"
) -> PagedKV:
    """A cache of sequences of these lengths, with random tokens in shuffled pages.

    Everything that no one may read (tails of pages, free pages, and the last page, which unused entries of the block
    table name) is NaN; in quantized pages the scales and zeros are.
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
    return PagedKV(k_pages, v_pages, block_table.to(device))


def to_device(device: str, pages: KVPages) -> KVPages:
    """The pages on another device."""
    return pages.to(device) if isinstance(pages, Tensor) else pages.map(lambda x: x.to(device))
