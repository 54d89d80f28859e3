"""One access to shared memory by the threads of a block: the bytes it touches, and the bank conflicts it has.

Most addresses are the same in all blocks, so an access has one row of addresses for all of them, or a row a block.
"""

from functools import cached_property

import numpy as np

WARP = 2048  # codes of who touched a granule: a thread; WARP + w for several threads of warp w; SEVERAL warps; ATOMIC
SEVERAL = 8192
ATOMIC = 8193  # operations, of any threads


class Access:
    """The bytes of one access.

    address   int64 [1 or blocks, 1 or threads], 0 where the mask is not set
    mask      bool [1 or blocks, threads]; None: every thread
    size      bytes of each thread
    """

    def __init__(self, address: np.ndarray, mask: np.ndarray | None, size: int, threads: int):
        self.address, self.mask, self.size, self.threads = address, mask, size, threads
        self.rows = max(address.shape[0], 1 if mask is None else mask.shape[0])

    @cached_property
    def lanes(self) -> np.ndarray:
        """The threads that take part, where there is one row of addresses."""
        assert self.mask is not None
        return np.flatnonzero(self.mask[0])

    def units(self, width: int) -> np.ndarray:
        """The number of the element of that width at each address."""
        shift = width.bit_length() - 1
        kept = self.__dict__.setdefault(f"units of {width}", None)
        if kept is None:
            kept = self.__dict__[f"units of {width}"] = self.address >> shift
        return kept

    def touched(self, granule: int, granules: int) -> tuple[np.ndarray, np.ndarray]:
        """The granules that are touched, in order, counted through all rows, and the code of who touches each."""
        kept = self.__dict__.get("granules")
        if kept is None:
            kept = self.__dict__["granules"] = self._touched(granule, granules)
        return kept

    def _touched(self, granule: int, granules: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (self.rows, self.threads)
        first = self.address // granule + np.arange(self.address.shape[0])[:, None] * granules
        if self.address.shape[0] < self.rows:
            first = first + np.arange(self.rows)[:, None] * granules
        thread = np.broadcast_to(np.arange(self.threads), shape)
        first = np.broadcast_to(first, shape)
        if self.mask is not None:
            mask = np.broadcast_to(self.mask, shape)
            first, thread = first[mask], thread[mask]
        at = (first.reshape(-1, 1) + np.arange(max(1, self.size // granule))).ravel()
        who = np.repeat(thread.ravel(), max(1, self.size // granule))
        return merge_accesses(at, who)

    @cached_property
    def overlaps(self) -> bool:
        """True if two threads touch the same bytes."""
        codes = self.__dict__["granules"][1]
        return bool((codes >= WARP).any())

    @cached_property
    def wavefronts(self) -> tuple[int, int]:
        """(phases that the hardware needs at least, wavefronts that it takes), summed over the rows."""
        lanes = 32 if self.size <= 4 else 16 if self.size == 8 else 8
        shape = (self.rows, self.threads)
        word = np.broadcast_to(self.address >> 2, shape)
        if self.mask is not None:
            word = np.where(self.mask, word, -1)
        if self.threads % lanes:
            word = np.pad(word, ((0, 0), (0, -self.threads % lanes)), constant_values=-1)
        word = word.reshape(-1, lanes)
        word = word[(word >= 0).any(1)]
        if not len(word):
            return 0, 0
        if self.size > 4:
            word = np.where(word[..., None] >= 0, word[..., None] + np.arange(self.size // 4), -1).reshape(
                len(word), -1
            )
        return len(word), bank_conflicts(word)

    def matrix_units(self, count: int, transposed: bool) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """The words of each matrix that the threads hold; of transposed ones the low and the high halves."""
        key = f"matrices {transposed}"
        if key not in self.__dict__:
            lane = np.arange(32)
            rows = self.address.reshape(len(self.address), -1, 4, 8)

            def units(matrix: int, row: np.ndarray, byte: np.ndarray, width: int) -> np.ndarray:
                return ((rows[:, :, matrix, row] + byte) // width).reshape(len(rows), -1)

            if transposed:
                halves = [
                    [units(n, 2 * (lane % 4) + half, 2 * (lane // 4), 2) for n in range(count)] for half in (0, 1)
                ]
                self.__dict__[key] = halves[0], halves[1]
            else:
                self.__dict__[key] = [units(n, lane // 4, 4 * (lane % 4), 4) for n in range(count)], None
        return self.__dict__[key]

    def matrix_mask(self, count: int, transposed: bool) -> list[list[np.ndarray]] | None:
        """Which threads' words lie in rows that are stored, by half and matrix; None: all."""
        if self.mask is None:
            return None
        lane = np.arange(32)
        rows = self.mask.reshape(len(self.mask), -1, 4, 8)
        if transposed:
            return [[rows[:, :, n, 2 * (lane % 4) + h].reshape(len(rows), -1) for n in range(count)] for h in (0, 1)]
        return [[rows[:, :, n, lane // 4].reshape(len(rows), -1) for n in range(count)]]

    def select(self, keep: np.ndarray, granules: int) -> "Access":
        """The access of some of the blocks."""
        if self.rows == 1:
            return self
        address = self.address[keep] if len(self.address) > 1 else self.address
        mask = self.mask[keep] if self.mask is not None and len(self.mask) > 1 else self.mask
        some = Access(address, mask, self.size, self.threads)
        if (kept := self.__dict__.get("granules")) is not None:
            at, who = kept
            held = keep[at // granules]
            number = np.cumsum(keep) - 1
            some.__dict__["granules"] = number[at[held] // granules] * granules + at[held] % granules, who[held]
        return some


def merge_accesses(at: np.ndarray, who: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The granules once each, with the code of all that touch it; `who` holds threads."""
    order = np.argsort(at, kind="stable")
    at, who = at[order], who[order]
    first = np.flatnonzero(np.diff(at, prepend=at[:1] - 1)) if len(at) else np.zeros(0, np.int64)
    if len(first) == len(at):
        return at, who.astype(np.int16)
    low, high = np.minimum.reduceat(who, first), np.maximum.reduceat(who, first)
    code = np.where(low == high, low, np.where(low >> 5 == high >> 5, WARP + (low >> 5), SEVERAL))
    return at[first], code.astype(np.int16)


def bank_conflicts(words: np.ndarray) -> int:
    """Wavefronts of phases [phases, words]: the most distinct words in one of 32 banks, summed; -1 is no word."""
    words = np.sort(words, axis=1)
    new = np.ones(words.shape, bool)
    new[:, 1:] = words[:, 1:] != words[:, :-1]
    new &= words >= 0
    bank = (np.arange(len(words))[:, None] * 32 + (words & 31))[new]
    return int(np.bincount(bank, minlength=32 * len(words)).reshape(-1, 32).max(1).sum())
