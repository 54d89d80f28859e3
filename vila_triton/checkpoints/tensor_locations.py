"""Where in files tensors lie, and their reading through private memory maps: nothing is copied that need not be."""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.reading import LoadError, shown

DTYPES = {  # names in a safetensors header; others are not read
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DIMENSIONS = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `size` bytes from byte `start` of a file, and how its elements are found in them."""

    file: Path
    start: int
    size: int
    like: Tensor  # on the meta device: shape, strides, dtype
    first: int = 0  # element of the bytes that is the tensor's first
    swapped: bool = False  # the highest byte of an element comes first


def like(what: str, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    """A tensor on the meta device. Errors: `LoadError` for sizes that no tensor has."""
    try:
        if len(shape) > DIMENSIONS:
            raise OverflowError
        if stride is None:
            return torch.empty(tuple(shape), dtype=dtype, device="meta")
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta")
    except (RuntimeError, OverflowError, TypeError):
        raise LoadError(f"{what} has the shape {shown(list(shape))}, which no tensor has") from None


def require_within(what: str, place: Place) -> None:
    """Errors: `LoadError` if a tensor is not in the bytes of its place, or is of more elements than they hold."""
    held, shape = place.size // place.like.itemsize, place.like.shape
    last = place.first + sum((n - 1) * step for n, step in zip(shape, place.like.stride()))
    if math.prod(shape) and (place.first < 0 or last >= held or math.prod(shape) > held):
        raise LoadError(f"{what} has the shape {shown(list(shape))}, but there are {held} elements where it lies")


class Files:
    """Memory maps of files, made when first needed."""

    def __init__(self) -> None:
        self.maps: dict[Path, mmap.mmap] = {}

    def read(self, place: Place) -> Tensor:
        """A view of the file, or a copy if it has to be put in order."""
        like, count = place.like, place.size // place.like.itemsize
        if not count:
            return torch.empty_like(like, device="cpu")
        if place.file not in self.maps:
            with place.file.open("rb") as opened:
                self.maps[place.file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        held = self.maps[place.file]
        if place.swapped or place.start % like.itemsize:  # only as bytes can it be taken from there
            loose = torch.frombuffer(held, dtype=torch.uint8, count=count * like.itemsize, offset=place.start)
            elements = loose.view(count, like.itemsize)
            flat = (elements.flip(1) if place.swapped else elements.clone()).flatten().view(like.dtype)
        else:
            flat = torch.frombuffer(held, dtype=like.dtype, count=count, offset=place.start)
        return flat.as_strided(like.shape, like.stride(), place.first)

    def forget(self, place: Place) -> None:
        """Give back the memory that reading took; a view is read again when it is touched again."""
        begin = -(-place.start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (place.start + place.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and place.file in self.maps:
            self.maps[place.file].madvise(mmap.MADV_DONTNEED, begin, end - begin)
