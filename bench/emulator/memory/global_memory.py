"""Global memory: the tensors' own bytes, with every access checked against the elements that there are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .atomics import apply_atomic
from .block_races import BlockRaces
from .coalescing import SECTOR, count_sectors
from .lockstep import Lockstep
from .regions import WORD, Part, Region
from .vectors import join_words, split_words

Array = np.ndarray
REMEMBERED = 4096  # patterns of addresses of a program, at most


class Regions:
    """The memory of one launch, which all its machines share, with who of them wrote what."""

    def __init__(self, regions: Iterable[Region]):
        self.regions = sorted(regions, key=lambda region: region.low)
        self.low = np.array([region.low for region in self.regions], np.uint64)
        self.high = np.array([region.high for region in self.regions], np.uint64)
        self.races: BlockRaces | None = None

    def __iter__(self):
        return iter(self.regions)

    def watch_blocks(self, machine: Lockstep) -> BlockRaces:
        """The record of which block touched what, of regions that the kernel can write."""
        if self.races is None:
            written = machine.program.memory.written
            watched = set(self.regions)
            if written is not None and self.regions:
                addresses = [int(machine.params[name].ravel()[0]) for name in written if name in machine.params]
                places = np.searchsorted(self.low, np.array(addresses, np.uint64), "right") - 1
                watched = {self.regions[max(0, n)] for n in places}
            facts = machine.program.memory
            self.races = BlockRaces(watched, facts.global_unit, facts.releases)
        return self.races


class GlobalMemory:
    """Global memory of a machine. Address, mask and values are arrays [1 or blocks, 1 or threads].

    patterns   of the program's addresses that were counted before
    """

    def __init__(self, machine: Lockstep, regions: Regions | Iterable[Region]):
        self.machine = machine
        self.regions = regions if isinstance(regions, Regions) else Regions(regions)
        self.races = self.regions.watch_blocks(machine) if machine.checks else None
        self.patterns: dict = machine.program.remembered.setdefault("global", {})

    def select(self, machine: Lockstep, keep: Array) -> GlobalMemory:
        """The memory as some of the blocks see it."""
        new = object.__new__(GlobalMemory)
        new.__dict__.update(self.__dict__, machine=machine)
        return new

    # ---- accesses
    def taking_part(self, mask: Array | None) -> Array | None:
        """The threads that are active and not masked off, in one row if all blocks are alike."""
        active = self.machine.active
        if active is not None:
            mask = active if mask is None else active & mask
        if mask is not None:
            if len(mask) > 1 and (mask == mask[:1]).all():
                mask = mask[:1]
            if mask.all():
                return None
        return mask

    def access(self, i: int, address: Array, mask: Array | None, size: int, verb: str) -> list[Part]:
        """Count an access and check its bounds: the regions it touches, without threads that may not."""
        if (mask is None or len(mask) == 1) and (parts := self.pattern(i, address, mask, size)) is not None:
            return parts
        if mask is not None:
            address, mask = np.broadcast_arrays(address, mask)
        if self.machine.counters:
            self.count(i, count_sectors(self.full(address), mask if mask is None else self.full(mask), size), 1)
        return self.locate(i, address, mask, size, verb)

    def full(self, x: Array) -> Array:
        """An array of every block and thread."""
        return np.broadcast_to(x, (self.machine.blocks, self.machine.threads))

    def pattern(self, i: int, address: Array, mask: Array | None, size: int) -> list[Part] | None:
        """The same for a pattern of addresses that all blocks have, each at its own place in one region.

        Returns None where that is not so, or where something is wrong.
        """
        base = address[:, :1]
        offset = address - base
        if len(offset) > 1:
            if not (offset == offset[:1]).all():
                return None
            offset = offset[:1]
        rest = int(base[0, 0]) % SECTOR
        key = (i, size, offset.tobytes(), None if mask is None else mask.tobytes(), rest)
        kept = self.patterns.get(key)
        if kept is None:
            kept = self._pattern(offset + np.uint64(rest), mask, size)
            if len(self.patterns) >= REMEMBERED:
                self.patterns.clear()
            self.patterns[key] = kept
        low, span, counted = kept
        if low is None:  # no thread takes part
            return []
        if ((base ^ base[:1]) & np.uint64(SECTOR - 1)).any() or counted is None:
            return None
        first = base - np.uint64(rest) + low
        end = first + span
        n = int(np.searchsorted(self.regions.low, first[0, 0], "right")) - 1
        if n < 0 or (first < self.regions.low[n]).any() or (end > self.regions.high[n]).any() or (end < first).any():
            return None
        region = self.regions.regions[n]
        if region.valid is not None and self.machine.checks:
            whole = region.elements(size)[self.unit(region, address, mask, size)]
            if not (whole if mask is None else whole | ~mask).all():
                return None
        if self.machine.counters:
            self.count(i, counted, self.machine.blocks)
        return [Part(region, mask)]

    def _pattern(self, offset: Array, mask: Array | None, size: int) -> tuple:
        """(lowest offset, bytes to the end of the highest, counts) of a row; counts None if one is misaligned."""
        threads = self.machine.threads
        row = np.broadcast_to(offset, (1, threads))
        live = row if mask is None else row[np.broadcast_to(mask, row.shape)]
        if not live.size:
            return None, None, None
        signed = live.view(np.int64) if live.flags.c_contiguous else live.astype(np.int64)
        low, high = int(signed.min()), int(signed.max()) + size
        counted = None
        if not (signed & (size - 1)).any():
            counted = count_sectors(row, None if mask is None else np.broadcast_to(mask, row.shape), size)
        return np.uint64(low % 2**64), np.uint64(high - low), counted

    def count(self, i: int, counted: tuple[int, int, int, int], times: int) -> None:
        counts = self.machine.counts
        for name, number in zip(("requests", "sectors", "fewest_sectors", "bytes"), counted):
            counts[i, name] += number * times

    def locate(self, i: int, address: Array, mask: Array | None, size: int, verb: str) -> list[Part]:
        """The regions of any addresses, and the faults of those that lie nowhere."""
        bad = address & np.uint64(size - 1) != 0
        if mask is not None:
            bad &= mask
        if bad.any():
            self.machine.fault(i, "misaligned", f"{verb} {size} bytes at an address that is no multiple of {size}", bad)
            mask = ~bad if mask is None else mask & ~bad
        if not self.regions.regions:
            self.machine.fault(i, "out of bounds", f"{verb} {size} bytes, and no argument has memory", mask)
            return []
        n = np.searchsorted(self.regions.low, address, "right") - 1
        inside = (n >= 0) & (address + np.uint64(size) <= self.regions.high[n])
        bad = ~inside if mask is None else ~inside & mask
        if bad.any():
            self.machine.fault(i, "out of bounds", self.describe(verb, size, int(address[bad][0])), bad)
            mask = inside if mask is None else inside & mask
        parts = []
        touched = n if mask is None else n[mask]
        one = touched.size and touched.min() == touched.max()
        numbers = touched.ravel()[:1] if one else np.unique(touched)
        for number in numbers:
            region = self.regions.regions[number]
            held = mask if len(numbers) == 1 else (n == number) if mask is None else (n == number) & mask
            if region.valid is not None:
                bad = ~region.elements(size)[self.unit(region, address, held, size)]
                bad = bad if held is None else bad & held
                if bad.any():
                    text = self.describe(verb, size, int(address[bad][0]))
                    self.machine.fault(i, "between elements", text, bad)
                    held = ~bad if held is None else held & ~bad
            parts.append(Part(region, held))
        return parts

    def describe(self, verb: str, size: int, address: int) -> str:
        """An access in words, by the region that is nearest."""
        region = min(self.regions, key=lambda r: max(r.low - address, address - r.high + 1, 0))
        span = region.high - region.low
        return f"{verb} {size} bytes at {address - region.low:+} of {region.name}, whose elements span {span} bytes"

    def unit(self, region: Region, address: Array, mask: Array | None, size: int) -> Array:
        """The number of the element of that size, from the region's base; 0 for masked-off threads."""
        at = (address - np.uint64(region.base)).view(np.int64) >> (size.bit_length() - 1)
        return at if mask is None else np.where(mask, at, 0)

    # ---- loads and stores
    def load(self, i: int, address: Array, mask: Array | None, width: int, count: int, old: list | None) -> list[Array]:
        """`count` elements of `width` bytes each."""
        mask, size = self.taking_part(mask), width * count
        result = None if old is None else [np.asarray(x) for x in old]
        for part in self.access(i, address, mask, size, "reads"):
            at = self.unit(part.region, address, part.mask, size)
            if self.races and part.region in self.races.regions:
                self.races.note_read(self.machine, i, part, at, size)
            values = split_words(part.region.views[size].take(at), width, count)
            if part.mask is None or result is None:
                result = values
            else:
                result = [np.where(part.mask, value, kept) for value, kept in zip(values, result)]
        return result or [np.zeros((1, 1), WORD[width])] * count

    copy = load

    def store(self, i: int, address: Array, mask: Array | None, width: int, values: list[Array]) -> None:
        """Write elements of `width` bytes."""
        mask, size = self.taking_part(mask), width * len(values)
        shape = (self.machine.blocks, self.machine.threads)
        for part in self.access(i, address, mask, size, "writes"):
            at = self.unit(part.region, address, part.mask, size)
            if self.races:
                self.races.note_write(self.machine, i, part, at, size)
            at, value = np.broadcast_to(at, shape), join_words(values, width, shape)
            if part.mask is not None:
                held = np.broadcast_to(part.mask, shape)
                at, value = at[held], value[held]
            part.region.views[size][at] = value

    def atomic(
        self, i: int, operation: str, kind: str, address: Array, mask: Array | None, values: list[Array],
        old: Array | None, order: str, scope: str,
    ) -> Array:  # fmt: skip
        """An atomic operation, in the order of the blocks, then of the threads. Returns the values before."""
        mask, width = self.taking_part(mask), values[0].itemsize
        result = np.zeros((1, 1), values[0].dtype) if old is None else old
        for part in self.access(i, address, mask, width, "updates"):
            at = self.full(self.unit(part.region, address, part.mask, width))
            held = None if part.mask is None else self.full(part.mask)
            result = apply_atomic(part.region.views[width], at, held, operation, kind, values, result)
            if self.races:
                wrote = (result == values[0]) if operation == "cas" else None
                self.races.note_atomic(self.machine, i, part, at, width, order, scope, wrote)
        return result

    def fence(self, i: int, order: str, scope: str) -> None:
        """A fence of one block's memory operations, for other blocks unless its scope is the block."""
        if self.races and scope != "cta":
            self.races.at_barrier(self.machine, fence=True)

    def barrier(self) -> None:
        """A barrier of all threads of a block."""
        if self.races:
            self.races.at_barrier(self.machine)
