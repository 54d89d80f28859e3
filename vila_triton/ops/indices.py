"""Values of index arguments: every page, slot, length and start that is named exists.

They are looked at on a CPU always. On a GPU that would wait for the device, so there it takes VILA_TRITON_DEBUG=1 in
the environment, which changes no result. Errors: IndexError naming the op, the argument, the value and the bound.
"""

import os
from itertools import pairwise

import torch
from torch import Tensor


def readable(device: torch.device) -> bool:
    """Whether values on this device are looked at. Errors: ValueError for what VILA_TRITON_DEBUG may not be."""
    debug = os.environ.get("VILA_TRITON_DEBUG", "")
    if debug not in ("", "0", "1"):
        raise ValueError(f"VILA_TRITON_DEBUG is {debug!r}, expected 1, or 0")
    return device.type == "cpu" or (device.type == "cuda" and debug == "1")


def outside(x: Tensor, low: int | None, high: int) -> int | None:
    """A value of x above `high`, or below `low` if there is such an end; None if all lie within."""
    if not x.numel():
        return None
    least, most = (int(end) for end in x.aminmax())
    return most if most > high else least if low is not None and least < low else None


def within(where: str, name: str, x: Tensor, low: int | None, high: int, what: str) -> None:
    """IndexError if a value of x is outside; `what` says where the bound comes from."""
    if readable(x.device) and (wrong := outside(x, low, high)) is not None:
        expected = f"at most {high}" if low is None else f"{low} to {high}"
        raise IndexError(f"{where}: {name} holds {wrong}, expected {expected}: {what}")


def check_slots(where: str, slot_mapping: Tensor, pages: int, length: int) -> None:
    """A slot below 0 stands for a token that is not cached."""
    within(where, "slot_mapping", slot_mapping, None, pages * length - 1, f"there are {pages} pages of {length} tokens")


def check_cached(where: str, block_table: Tensor, name: str, lengths: Tensor, pages: int, length: int) -> None:
    """The block table [b, n] has room for the cached tokens, `lengths` [b], and names a page for each of them.

    What its entries beyond those are does not matter.
    """
    if not readable(block_table.device):
        return
    named = block_table.shape[1]
    within(where, name, lengths, 0, named * length, f"block_table has room for {named} pages of {length} tokens")
    if outside(block_table, 0, pages - 1) is not None:
        used = torch.arange(0, named * length, length, device=lengths.device) < lengths[:, None]  # [b, n]
        within(where, "block_table", block_table[used], 0, pages - 1, f"there are {pages} pages")


def check_starts(where: str, query_start: Tensor, s: int) -> None:
    """Rows of the sequences lie end to end: query_start [b+1] rises from 0 to s."""
    if not readable(query_start.device):
        return
    starts = query_start.tolist()
    for i, (before, start) in enumerate(pairwise([0, *starts])):
        low, high = (s if i == len(starts) - 1 else before), (s if i else 0)
        if not low <= start <= high:
            expected = low if low >= high else f"{low} to {high}"
            raise IndexError(f"{where}: query_start[{i}] is {start}, expected {expected}: there are {s} new tokens")
