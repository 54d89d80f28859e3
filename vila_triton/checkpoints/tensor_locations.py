"""Where tensors lie in files, and their reading through private memory maps, which copies as little as possible."""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vila_triton.files.reading import LoadError, short_repr

SAFETENSORS_DTYPES = {  # names in a safetensors header; others are not read
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
MAX_DIMS = 64


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies: `nbytes` bytes from byte `start` of a file, and how its elements are found in them."""

    file: Path
    start: int
    nbytes: int
    meta: Tensor  # on the meta device: shape, strides, dtype
    storage_offset: int = 0  # element of the bytes that is the tensor's first
    big_endian: bool = False  # the highest byte of an element comes first


def meta_tensor(label: str, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    """Make a tensor on the meta device. Errors: `LoadError`, naming the label, for sizes that no tensor has."""
    try:
        if len(shape) > MAX_DIMS:
            raise OverflowError
        if stride is None:
            return torch.empty(tuple(shape), dtype=dtype, device="meta")
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta")
    except (RuntimeError, OverflowError, TypeError):
        raise LoadError(f"{label} has the shape {short_repr(list(shape))}, which no tensor has") from None


def require_within_file(label: str, location: TensorLocation) -> None:
    """Check that a tensor lies within its bytes, and has no more elements than they hold. Errors: `LoadError`."""
    num_elements, shape = location.nbytes // location.meta.itemsize, location.meta.shape
    last = location.storage_offset + sum((n - 1) * stride for n, stride in zip(shape, location.meta.stride()))
    if math.prod(shape) and (location.storage_offset < 0 or last >= num_elements or math.prod(shape) > num_elements):
        raise LoadError(
            f"{label} has the shape {short_repr(list(shape))}, but there are {num_elements} elements where it lies"
        )


class MappedFiles:
    """Memory maps of files, each made when it is first needed."""

    def __init__(self) -> None:
        self.maps: dict[Path, mmap.mmap] = {}

    def read(self, location: TensorLocation) -> Tensor:
        """Read a tensor: a view of the file, or a copy if its bytes are not aligned or in the other byte order."""
        meta, count = location.meta, location.nbytes // location.meta.itemsize
        if not count:
            return torch.empty_like(meta, device="cpu")
        if location.file not in self.maps:
            with location.file.open("rb") as stream:
                self.maps[location.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = self.maps[location.file]
        if location.big_endian or location.start % meta.itemsize:  # only as bytes can it be taken from there
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count * meta.itemsize, offset=location.start)
            elements = raw.view(count, meta.itemsize)
            flat = (elements.flip(1) if location.big_endian else elements.clone()).flatten().view(meta.dtype)
        else:
            flat = torch.frombuffer(mapped, dtype=meta.dtype, count=count, offset=location.start)
        return flat.as_strided(meta.shape, meta.stride(), location.storage_offset)

    def release(self, location: TensorLocation) -> None:
        """Give back the memory that reading a tensor took. A view of it stays valid and is read again when it is
        touched.
        """
        begin = -(-location.start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (location.start + location.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and location.file in self.maps:
            self.maps[location.file].madvise(mmap.MADV_DONTNEED, begin, end - begin)
