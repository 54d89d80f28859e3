"""The cache in the form of libraries that look for all keys of a sequence, new ones included, in its pages."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops.kv_write import gather_tokens


class RepagedCache(NamedTuple):
    """The keys and values of each sequence in pages of its own, all full but the last; no page is shared or unused."""

    k_pages: Tensor  # [p, l, g, d]
    v_pages: Tensor
    seq_lens: Tensor  # [b] int32, on the CPU
    page_counts: Tensor  # [b] int32, on the CPU: how many pages it has; they follow each other

    def block_table(self) -> Tensor:
        """[b, pages] int32 on the device of the pages; entries past the end of a sequence name page 0."""
        columns = torch.arange(int(self.page_counts.max()))
        first_page = self.page_counts.cumsum(0) - self.page_counts
        table = torch.where(columns < self.page_counts[:, None], first_page[:, None] + columns, 0)
        return table.to(self.k_pages.device, torch.int32)


def repage(
    page_size: int, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor, *new: Tensor
) -> RepagedCache:
    """Pages of `length` tokens with what is cached, followed by new = k, v, query_start if given. A copy.

    Waits for the device. A sequence without any token gets a page that holds none.
    """
    tokens = [
        [gather_tokens(x, row, t) for row, t in zip(block_table, context_lens.tolist())] for x in (k_pages, v_pages)
    ]
    if new:
        *values, query_start_loc = new
        bounds = [*pairwise(query_start_loc.tolist())]
        tokens = [
            [torch.cat((old, x[slice(*b)])) for old, b in zip(cached, bounds)] for cached, x in zip(tokens, values)
        ]
    seq_lens = torch.tensor([len(x) for x in tokens[0]], dtype=torch.int32)
    page_counts = (seq_lens + page_size - 1).div(page_size, rounding_mode="floor").clamp(min=1)
    repaged_k, repaged_v = (
        torch.cat([F.pad(x, (0, 0, 0, 0, 0, n * page_size - len(x))) for x, n in zip(held, page_counts.tolist())])
        for held in tokens
    )
    return RepagedCache(
        repaged_k.unflatten(0, (-1, page_size)), repaged_v.unflatten(0, (-1, page_size)), seq_lens, page_counts
    )
