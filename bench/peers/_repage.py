"""The cache as libraries want it that look for all keys of a sequence, the new ones included, in its pages."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import PagedKV
from vila_triton.ops.kv_pages import gather_tokens
from vila_triton.registry import Unsupported


def plain_pages(peer: str, cache: PagedKV) -> tuple[Tensor, Tensor]:
    """The pages of keys and of values. Errors: Unsupported if they are quantized."""
    if not isinstance(cache.k_pages, Tensor) or not isinstance(cache.v_pages, Tensor):
        raise Unsupported(f"{peer}: does not read quantized pages")
    return cache.k_pages, cache.v_pages


class RepagedCache(NamedTuple):
    """The keys and values of each sequence in pages of its own, all full but the last; no page is shared or unused."""

    k_pages: Tensor  # [p, l, g, d]
    v_pages: Tensor
    seq_lens: Tensor  # [b] int32, on the CPU
    page_counts: Tensor  # [b] int32, on the CPU; the pages of a sequence follow each other

    def block_table(self) -> Tensor:
        """[b, pages] int32 on the device of the pages; entries past the end of a sequence name page 0."""
        columns = torch.arange(int(self.page_counts.max()))
        first_page = self.page_counts.cumsum(0) - self.page_counts
        table = torch.where(columns < self.page_counts[:, None], first_page[:, None] + columns, 0)
        return table.to(self.k_pages.device, torch.int32)


def repage(
    page_size: int, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor, *new: Tensor
) -> RepagedCache:
    """A copy, in pages of another size, of the cached tokens, followed by new = (k, v, query_start_loc) if given.

    Waits for the device. A sequence without any token gets a page that holds none.
    """
    lens = context_lens.tolist()
    sequences = [[gather_tokens(x, row, t) for row, t in zip(block_table, lens)] for x in (k_pages, v_pages)]
    if new:
        *new_values, query_start_loc = new
        rows = [slice(*ends) for ends in pairwise(query_start_loc.tolist())]
        sequences = [
            [torch.cat((old, x[new_rows])) for old, new_rows in zip(cached, rows)]
            for cached, x in zip(sequences, new_values)
        ]
    seq_lens = torch.tensor([len(x) for x in sequences[0]], dtype=torch.int32)
    page_counts = (seq_lens + page_size - 1).div(page_size, rounding_mode="floor").clamp(min=1)
    repaged_k, repaged_v = (
        torch.cat(
            [F.pad(x, (0, 0, 0, 0, 0, n * page_size - len(x))) for x, n in zip(values, page_counts.tolist())]
        ).unflatten(0, (-1, page_size))
        for values in sequences
    )
    return RepagedCache(repaged_k, repaged_v, seq_lens, page_counts)
