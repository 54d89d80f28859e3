"""Memory in which offsets, counted in elements, do not fit 32 bits. It is mostly never touched."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.correctness.error_budget import DEVICE

BYTES = 2**32 + 2**29  # 2³¹ elements of two bytes each, and some


@pytest.fixture
def far() -> Iterator[Tensor]:
    """BYTES of memory. On a GPU they go back to it after each test, so that many processes can share one.

    On a CPU there is as much before them, so that an offset that wrapped reads something wrong, and ends no process.
    """
    before = 2**32 if DEVICE == "cpu" else 0
    try:
        memory = torch.empty(before + BYTES, dtype=torch.uint8, device=DEVICE)[before:]
    except RuntimeError:
        pytest.skip(f"no room for {(before + BYTES) / 2**30:.2f} GiB in one piece")
    yield memory
    memory.untyped_storage().resize_(0)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def spread(x: Tensor, strides: tuple[int, ...], far: Tensor, place: int = 0) -> Tensor:
    """A copy of x with these strides; of several in the same memory each needs a place of its own, 0 to 9."""
    start = far[place * 2**22 :]
    start = start[: len(start) // x.itemsize * x.itemsize]
    return start.view(x.dtype).as_strided(x.shape, strides, start.storage_offset() // x.itemsize).copy_(x)


def apart(x: Tensor, far: Tensor, place: int = 0, last: int = -1) -> Tensor:
    """A copy of x, of at most two bytes an element, whose row `last` begins more than 2³¹ elements after the first."""
    stride = 2**31 // (last % len(x)) + 8
    return spread(x, (stride, *torch.empty(x.shape[1:], device="meta").stride()), far, place)
