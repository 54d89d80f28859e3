"""The cache in the form of libraries that look for all keys of a sequence, new ones included, in its pages."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops.kv_write import gather


class Whole(NamedTuple):
    """The keys and values of each sequence in pages of its own, all full but the last; no page is shared or unused."""

    k_pages: Tensor  # [p, l, g, d]
    v_pages: Tensor
    lengths: Tensor  # [b] int32, on the CPU
    pages: Tensor  # [b] int32, on the CPU: how many pages it has; they follow each other

    def block_table(self) -> Tensor:
        """[b, pages] int32 on the device of the pages; entries past the end of a sequence name page 0."""
        most = torch.arange(int(self.pages.max()))
        first = self.pages.cumsum(0) - self.pages
        table = torch.where(most < self.pages[:, None], first[:, None] + most, 0)
        return table.to(self.k_pages.device, torch.int32)


def whole(length: int, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, cached: Tensor, *new: Tensor) -> Whole:
    """Pages of `length` tokens with what is cached, followed by new = k, v, query_start if given. A copy.

    Waits for the device. A sequence without any token gets a page that holds none.
    """
    tokens = [[gather(x, row, t) for row, t in zip(block_table, cached.tolist())] for x in (k_pages, v_pages)]
    if new:
        *values, query_start = new
        bounds = [*pairwise(query_start.tolist())]
        tokens = [[torch.cat((old, x[slice(*b)])) for old, b in zip(held, bounds)] for held, x in zip(tokens, values)]
    lengths = torch.tensor([len(x) for x in tokens[0]], dtype=torch.int32)
    pages = (lengths + length - 1).div(length, rounding_mode="floor").clamp(min=1)
    k_made, v_made = (
        torch.cat([F.pad(x, (0, 0, 0, 0, 0, n * length - len(x))) for x, n in zip(held, pages.tolist())])
        for held in tokens
    )
    return Whole(k_made.unflatten(0, (-1, length)), v_made.unflatten(0, (-1, length)), lengths, pages)
