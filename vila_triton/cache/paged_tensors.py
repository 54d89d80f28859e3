"""The KV cache of any model: the pages of all its layers as tensors, and the tensors of one step over them.

cache = PagedCache(num_pages=64, num_layers=2, num_kv_heads=4, head_dim=64)
seq = cache.allocator.add_sequence()
with cache.append_step({seq: 12}) as step:              # 12 new tokens, and where they go
    for layer in range(2):
        kv = step.layer(layer)
        kv_write(k, v, kv.k_pages, kv.v_pages, step.slot_mapping)
        out = prefill_attention(q, k, v, kv, step.batch, scale)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_triton.ops import KVPages, PagedKV, RaggedBatch, empty_kv_pages, page_tensors

from .page_allocator import PageAllocator, SlotAllocation

DEFAULT_PAGE_SIZE = 16


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Create tensors inside that can be used and written later in any mode, even if `torch.inference_mode` is active
    around it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class PagedStep:
    """One step over a ragged batch: s new tokens of b sequences, laid end to end, the places of these tokens in the
    pages, and the pages themselves.
    """

    k_pages: KVPages  # [layers, p, l, g, d]
    v_pages: KVPages  # [layers, p, l, g, d]
    slot_mapping: Tensor  # [s] int64
    block_table: Tensor  # [b, pages] int32
    query_start_loc: Tensor  # [b+1] int32
    context_lens: Tensor  # [b] int32
    seq_lens: Tensor  # [b] int32: with the new tokens
    positions: Tensor  # [s] int64: of each new token in its sequence

    def layer(self, layer: int) -> PagedKV:
        """The pages of a layer with the block table, as `prefill_attention` and `decode_attention` take them."""
        return PagedKV(self.k_pages[layer], self.v_pages[layer], self.block_table)

    @property
    def batch(self) -> RaggedBatch:
        """The new tokens, as `prefill_attention` takes them."""
        return RaggedBatch(self.query_start_loc, self.context_lens)


class PagedCache:
    """Keys and values of many sequences in `num_pages` pages of `page_size` tokens, for all layers of a model.

    `allocator` adds, forks, truncates and frees sequences (see `PageAllocator`); `append_step` gives new tokens their
    places. `k_pages` and `v_pages` are [layers, p, l, g, d], uninitialized where no token is.

    dtype: of the pages, a dtype of torch, or "int8" or "int4" for quantized ones (see `ops.QuantizedKVPages`). Errors:
    ValueError for sizes below 1 (`num_pages`: 0) and for other dtypes.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: torch.dtype | str = torch.float16,
        device: torch.device | str = "cpu",
    ):
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"PagedCache: {name} is {size}, expected 1 at least")
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise ValueError(f"PagedCache: dtype is {dtype}, expected a floating-point one, 'int8' or 'int4'")
        self.allocator = PageAllocator(num_pages, page_size)
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        with outside_inference_mode():
            self.k_pages = empty_kv_pages(shape, dtype, device)  # [layers, p, l, g, d]
            self.v_pages = empty_kv_pages(shape, dtype, device)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(x.nbytes for x in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the pages consist of, [layers, p, l, ...] each."""
        return [*page_tensors(self.k_pages), *page_tensors(self.v_pages)]

    def length(self, seq: int) -> int:
        """Cached tokens of a sequence. Errors: KeyError if there is no such sequence."""
        return self.allocator[seq].length

    @contextmanager
    def append_step(self, counts: Mapping[int, int]) -> Iterator[PagedStep]:
        """Append so many new tokens to each sequence, and yield the step to run, whose rows are the sequences in the
        order of `counts`; if the `with` fails, every sequence is as it was.

        Errors, before anything is changed: `OutOfPages`, KeyError for a sequence that does not exist, ValueError for a
        count below 0 or for no sequence at all.
        """
        if not counts:
            raise ValueError("append_step: counts are empty, expected one sequence at least")
        context_lens = [self.length(seq) for seq in counts]
        with self.append_slots(counts) as allocation:
            yield self._describe_step(context_lens, counts, allocation.slots)

    @contextmanager
    def append_slots(self, counts: Mapping[int, int]) -> Iterator[SlotAllocation]:
        """Append so many new tokens to each sequence, and yield their slots, in pages that nothing else has; all else
        as `append_step`.
        """
        context_lens = {seq: self.length(seq) for seq in counts}
        allocation = self.allocator.append(counts)
        try:
            self._copy_pages(allocation.copies)
            yield allocation
        except BaseException:
            for seq, length in context_lens.items():
                self.allocator.truncate(seq, length)
            self._copy_pages(allocation.copies)  # sequences keep their new pages, and the first copy may be incomplete
            raise

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            for x in self.tensors:
                x[:, target] = x[:, source]

    def _describe_step(self, context_lens: Sequence[int], counts: Mapping[int, int], slots: list[int]) -> PagedStep:
        device = self.k_pages.device
        page_lists = [self.allocator[seq].pages for seq in counts]
        width = max(1, *map(len, page_lists))
        new_lens = list(counts.values())
        query_start_loc = torch.tensor([0, *new_lens], device=device).cumsum(0).int()
        context = torch.tensor(context_lens, dtype=torch.int32, device=device)
        return PagedStep(
            self.k_pages,
            self.v_pages,
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor([t + [0] * (width - len(t)) for t in page_lists], dtype=torch.int32, device=device),
            query_start_loc,
            context,
            context + query_start_loc.diff(),
            torch.cat([torch.arange(start, start + n, device=device) for start, n in zip(context_lens, new_lens)]),
        )
