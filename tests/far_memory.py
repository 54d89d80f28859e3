"""Tensors in which offsets, counted in elements, do not fit 32 bits, in memory that is mostly never touched.

On a CPU each lies in a sparse mapping of its own: terabytes of addresses, of which only pages that are read or written
take memory. On a GPU memory is real, and a test is skipped where there is not enough.
"""

import mmap
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from bench.correctness.error_budget import DEVICE

LIMIT = 2**31  # the first offset that an int32 does not hold
FAR_STRIDE = LIMIT // 2  # fits an int32 as its product with 2 does not; Triton takes strides that do not fit as int64
MARGIN = 4 * LIMIT if DEVICE == "cpu" else 0  # elements before and after: offsets of four axes may have wrapped
SHARED_BYTES = 2**32 + 2**29  # LIMIT elements of two bytes each, and some
ROOM = 2**22  # bytes between the beginnings of tensors that share memory
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13; the number is Linux's


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def far_strides(shape: Sequence[int], axes: Collection[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, enlarged by one number on these axes, so that no two elements meet.

    On a CPU it is FAR_STRIDE, and index 2 lies beyond LIMIT; on a GPU, where memory is real, the last index just does.
    """
    return tuple(
        stride + (FAR_STRIDE if DEVICE == "cpu" else LIMIT // max(shape[axis] - 1, 1) + 1) * (axis in axes)
        for axis, stride in enumerate(contiguous_strides(shape))
    )


def sparse_mapping(num_bytes: int) -> Tensor:
    """So many zeros in uint8. Pages of 4 KiB, not huge ones of 2 MiB, take memory once they are touched."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    with suppress(OSError):  # of a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # which keeps the mapping as long as there are views of it


class FarMemory:
    """Makes far tensors. As a context it takes their memory back at its end: many processes can share a GPU."""

    def __init__(self) -> None:
        self.on_gpu: list[Tensor] = []
        self.shared: Tensor | None = None
        self.num_sharing = 0

    def __enter__(self) -> "FarMemory":
        return self

    def __exit__(self, *_: object) -> None:
        for memory in self.on_gpu:
            memory.untyped_storage().resize_(0)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory [num_bytes] uint8; skips the test where a GPU has no room for it."""
        if DEVICE == "cpu":
            return sparse_mapping(num_bytes)
        try:
            self.on_gpu.append(torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE))
        except RuntimeError:
            pytest.skip(f"no room for {num_bytes / 2**30:.2f} GiB in one piece")
        return self.on_gpu[-1]

    def empty_strided(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An empty tensor, on a CPU of zeros, as are MARGIN elements on both sides."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
        return self.allocate((size + 2 * MARGIN) * dtype.itemsize).view(dtype).as_strided(shape, strides, MARGIN)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, empty as in `empty_strided`."""
        return self.empty_strided(shape, contiguous_strides(shape), dtype)

    def spread(self, x: Tensor, strides: Sequence[int]) -> Tensor:
        """A copy of x with these strides."""
        return self.empty_strided(x.shape, strides, x.dtype).copy_(x)

    def apart(self, x: Tensor, last: int = -1) -> Tensor:
        """A copy of x whose row `last` begins more than LIMIT elements after the first.

        On a GPU all copies share memory, which has room for elements of two bytes at most, and rows of ROOM bytes.
        """
        strides = (LIMIT // (last % len(x)) + 8, *contiguous_strides(x.shape[1:]))
        if DEVICE == "cpu":
            return self.spread(x, strides)
        self.shared = self.allocate(SHARED_BYTES) if self.shared is None else self.shared
        memory = self.shared[self.num_sharing * ROOM :].view(x.dtype)
        self.num_sharing += 1
        return memory.as_strided(x.shape, strides, memory.storage_offset()).copy_(x)

    def lengthen(self, x: Tensor, axis: int, count: int) -> Tensor:
        """A contiguous copy of x with `count` more entries along an axis, in front, empty as in `empty_strided`."""
        shape = [n + count * (i == axis) for i, n in enumerate(x.shape)]
        longer = self.empty(shape, x.dtype)
        longer.narrow(axis, count, x.shape[axis]).copy_(x)
        return longer


@pytest.fixture
def far() -> Iterator[FarMemory]:
    """Far memory for the length of a test."""
    with FarMemory() as memory:
        yield memory
