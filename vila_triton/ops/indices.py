"""Checks of the values of index arguments: pages, slots, lengths and starts of sequences must exist.

On a CPU they always run. On a GPU reading values waits for the device, so there they run only with VILA_TRITON_DEBUG=1
in the environment, which changes no result. They raise IndexError naming the op, the argument, the value and the bound.
"""

import os
from itertools import pairwise

import torch
from torch import Tensor


def can_read_values(device: torch.device) -> bool:
    """True if values on this device are checked. Raises ValueError for a VILA_TRITON_DEBUG other than 0 or 1."""
    debug = os.environ.get("VILA_TRITON_DEBUG", "")
    if debug not in ("", "0", "1"):
        raise ValueError(f"VILA_TRITON_DEBUG is {debug!r}, expected 1, or 0")
    return device.type == "cpu" or (device.type == "cuda" and debug == "1")


def value_out_of_range(x: Tensor, low: int | None, high: int) -> int | None:
    """A value of x above `high`, or below `low` unless that is None; None if all lie within."""
    if not x.numel():
        return None
    smallest, largest = (int(end) for end in x.aminmax())
    return largest if largest > high else smallest if low is not None and smallest < low else None


def check_value_range(op_name: str, name: str, x: Tensor, low: int | None, high: int, reason: str) -> None:
    """Raise IndexError if a value of x is out of range; `reason` says where the bound comes from."""
    if can_read_values(x.device) and (value := value_out_of_range(x, low, high)) is not None:
        expected = f"at most {high}" if low is None else f"{low} to {high}"
        raise IndexError(f"{op_name}: {name} holds {value}, expected {expected}: {reason}")


def check_slot_mapping(op_name: str, slot_mapping: Tensor, num_pages: int, page_size: int) -> None:
    """Slots lie within the pages; a negative one stands for a token that is not cached."""
    reason = f"there are {num_pages} pages of {page_size} tokens"
    check_value_range(op_name, "slot_mapping", slot_mapping, None, num_pages * page_size - 1, reason)


def check_block_table(
    op_name: str, block_table: Tensor, name: str, cached_lens: Tensor, num_pages: int, page_size: int
) -> None:
    """The block table [b, n] has room for the cached tokens, `cached_lens` [b], and a page that exists for each.

    name: of the argument that `cached_lens` is. Entries of the table beyond these tokens may be anything.
    """
    if not can_read_values(block_table.device):
        return
    capacity = block_table.shape[1] * page_size
    reason = f"block_table has room for {block_table.shape[1]} pages of {page_size} tokens"
    check_value_range(op_name, name, cached_lens, 0, capacity, reason)
    if value_out_of_range(block_table, 0, num_pages - 1) is not None:
        page_starts = torch.arange(0, capacity, page_size, device=cached_lens.device)
        used_pages = block_table[page_starts < cached_lens[:, None]]
        check_value_range(op_name, "block_table", used_pages, 0, num_pages - 1, f"there are {num_pages} pages")


def check_query_start_loc(op_name: str, query_start_loc: Tensor, s: int) -> None:
    """The sequences lie end to end: query_start_loc [b+1] rises from 0 to s."""
    if not can_read_values(query_start_loc.device):
        return
    starts = query_start_loc.tolist()
    for i, (previous, start) in enumerate(pairwise([0, *starts])):
        low, high = (s if i == len(starts) - 1 else previous), (s if i else 0)
        if not low <= start <= high:
            expected = low if low >= high else f"{low} to {high}"
            raise IndexError(
                f"{op_name}: query_start_loc[{i}] is {start}, expected {expected}: there are {s} new tokens"
            )
