"""The memory that a kernel may touch, and which bytes of it are elements of tensors."""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # what is moved at once
ALIGNED = 16


@dataclass(eq=False)
class Region:
    """Memory that a kernel may touch: that of one tensor, or of tensors that share their bytes.

    name     of an argument in it
    start    address
    nbytes   size
    valid    bool [nbytes], which bytes are elements; None: all of them
    """

    name: str
    start: int
    nbytes: int
    valid: Array | None = None

    def __post_init__(self) -> None:
        self.low, self.high = self.start, self.start + self.nbytes  # where elements begin and end
        if self.valid is not None:
            elements = np.flatnonzero(self.valid)
            first, end = (int(elements[0]), int(elements[-1]) + 1) if len(elements) else (0, 0)
            self.low, self.high = self.start + first, self.start + end
            if len(elements) == end - first:
                self.valid = None
        self.base = self.start // ALIGNED * ALIGNED
        words = -(-(self.start + self.nbytes - self.base) // ALIGNED)
        raw = (ctypes.c_uint8 * (words * ALIGNED)).from_address(self.base)
        self.views = {width: np.ctypeslib.as_array(raw).view(word) for width, word in WORD.items()}
        self.whole: dict[int, Array] = {}

    def elements(self, size: int) -> Array:
        """Which multiples of `size` bytes from the base hold elements only."""
        if size not in self.whole:
            every = np.zeros(len(self.views[1]), bool)
            every[self.start - self.base : self.start - self.base + self.nbytes] = (
                True if self.valid is None else self.valid
            )
            self.whole[size] = np.logical_and.reduce(every.reshape(-1, size), axis=1)
        return self.whole[size]


class Part(NamedTuple):
    """The threads of an access that touch one region; mask None: all."""

    region: Region
    mask: Array | None
