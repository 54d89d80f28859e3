"""Values of index arguments: every page, slot, length and start that is named exists.

They are looked at on a CPU always. On a GPU that would wait for the device, so there it takes VILA_TRITON_DEBUG=1 in
the environment, which changes no result. Errors: IndexError naming the op, the argument, the value and the bound.
"""

import os
from itertools import pairwise

import torch
from torch import Tensor


def can_read_values(device: torch.device) -> bool:
    """Whether values on this device are looked at. Errors: ValueError for what VILA_TRITON_DEBUG may not be."""
    debug = os.environ.get("VILA_TRITON_DEBUG", "")
    if debug not in ("", "0", "1"):
        raise ValueError(f"VILA_TRITON_DEBUG is {debug!r}, expected 1, or 0")
    return device.type == "cpu" or (device.type == "cuda" and debug == "1")


def value_out_of_range(x: Tensor, low: int | None, high: int) -> int | None:
    """A value of x above `high`, or below `low` if there is such an end; None if all lie within."""
    if not x.numel():
        return None
    smallest, largest = (int(end) for end in x.aminmax())
    return largest if largest > high else smallest if low is not None and smallest < low else None


def check_value_range(op_name: str, name: str, x: Tensor, low: int | None, high: int, reason: str) -> None:
    """IndexError if a value of x is outside; `what` says where the bound comes from."""
    if can_read_values(x.device) and (value := value_out_of_range(x, low, high)) is not None:
        expected = f"at most {high}" if low is None else f"{low} to {high}"
        raise IndexError(f"{op_name}: {name} holds {value}, expected {expected}: {reason}")


def check_slot_mapping(op_name: str, slot_mapping: Tensor, num_pages: int, page_size: int) -> None:
    """A slot below 0 stands for a token that is not cached."""
    check_value_range(
        op_name,
        "slot_mapping",
        slot_mapping,
        None,
        num_pages * page_size - 1,
        f"there are {num_pages} pages of {page_size} tokens",
    )


def check_block_table(
    op_name: str, block_table: Tensor, name: str, cached_lens: Tensor, num_pages: int, page_size: int
) -> None:
    """The block table [b, n] has room for the cached tokens, `cached_lens` [b], and names a page for each of them.

    What its entries beyond those are does not matter.
    """
    if not can_read_values(block_table.device):
        return
    max_pages = block_table.shape[1]
    check_value_range(
        op_name,
        name,
        cached_lens,
        0,
        max_pages * page_size,
        f"block_table has room for {max_pages} pages of {page_size} tokens",
    )
    if value_out_of_range(block_table, 0, num_pages - 1) is not None:
        used_mask = (
            torch.arange(0, max_pages * page_size, page_size, device=cached_lens.device) < cached_lens[:, None]
        )  # [b, n]
        check_value_range(
            op_name, "block_table", block_table[used_mask], 0, num_pages - 1, f"there are {num_pages} pages"
        )


def check_query_start_loc(op_name: str, query_start_loc: Tensor, s: int) -> None:
    """Rows of the sequences lie end to end: query_start_loc [b+1] rises from 0 to s."""
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
