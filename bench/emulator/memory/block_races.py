"""Races between the blocks of a grid: two that touch the same bytes of global memory, of which one writes them.

Blocks run in any order on a GPU. What one wrote another may touch only behind a chain of a release and an acquire.
What has the scope of a block (`cta`) is atomic for its threads only, and orders nothing for other blocks.
"""

from typing import Any

import numpy as np

from .lockstep import Lockstep
from .regions import Part, Region
from .release_chains import ReleaseChains

Array = np.ndarray
MANY = 2**30  # readers, or with a minus writers by atomics


class Record:
    """Who touched each unit of a region last, and at which time of the block's: block + 1, with a minus for atomics."""

    def __init__(self, units: int):
        self.writer, self.wrote_at = np.zeros(units, np.int32), np.zeros(units, np.int32)
        self.reader, self.read_at = np.zeros(units, np.int32), np.zeros(units, np.int32)
        self.writing_thread, self.reading_thread = np.zeros(units, np.int16), np.zeros(units, np.int16)  # -1: several


class Places:
    """The units that an access touches, with the block + 1 and the thread that does."""

    def __init__(self, machine: Lockstep, part: Part, at: Array, each: int):
        shape = (machine.blocks, machine.threads)
        at = np.broadcast_to(at, shape)
        block = np.broadcast_to((machine.block_ids + 1).astype(np.int32)[:, None], shape)
        thread = np.broadcast_to(np.arange(machine.threads, dtype=np.int16), shape)
        if part.mask is not None:
            held = np.broadcast_to(part.mask, shape)
            at, block, thread = at[held], block[held], thread[held]
        self.at = (at.reshape(-1, 1) * each + np.arange(each)).ravel()
        self.block, self.thread = block.ravel().repeat(each), thread.ravel().repeat(each)


class BlockRaces:
    """Which blocks wrote and read each unit of some regions.

    chains   None for a kernel in which no release can order accesses
    """

    def __init__(self, regions: set[Region], unit: int, chains: bool):
        self.regions, self.unit = regions, unit
        self.records: dict[Region, Record] = {}
        self.chains = ReleaseChains() if chains else None

    def places(self, machine: Lockstep, part: Part, at: Array, size: int) -> tuple[Places, Record]:
        """The units that an access touches, and their record."""
        if part.region not in self.records:
            self.records[part.region] = Record(len(part.region.views[1]) // self.unit)
            self.regions.add(part.region)
        return Places(machine, part, at, max(1, size // self.unit)), self.records[part.region]

    def times(self, block: Array) -> Array | int:
        return self.chains.times(block) if self.chains else 1

    def unordered(self, old: Array, when: Array, thread: Array, x: Places) -> Array:
        """Which of the accesses x are to what `thread` of the block `old` touched at `when`, and do not know of it."""
        bad = (old != 0) & (np.abs(old) != x.block)
        if self.chains and bad.any():
            for n in np.flatnonzero(bad):
                block, other = int(x.block[n]), abs(int(old[n]))
                if other == MANY:
                    bad[n] = not self.chains.knows_any(block)
                else:
                    bad[n] = not self.chains.knows(block, int(x.thread[n]), other, int(thread[n]), int(when[n]))
        return bad

    def check(self, machine: Lockstep, i: int, verbs: str, bad: Array, old: Array, x: Places) -> None:
        """A fault, where an access is to what another block touched."""
        if bad.any():
            n = int(np.argmax(bad))
            other = abs(int(old[n]))
            verb, past = verbs.split()
            who = "others" if other == MANY else f"block {other - 1}"
            text = f"block {x.block[n] - 1} {verb} what {who} {past} in this launch, and nothing orders them"
            mask = np.zeros((machine.blocks, machine.threads), bool)
            own = bad & (x.block == x.block[n])
            mask[machine.block_ids + 1 == x.block[n], x.thread[own]] = True
            machine.fault(i, "blocks race", text, mask)

    def check_writer(self, machine: Lockstep, i: int, verbs: str, record: Record, x: Places, strong: bool) -> None:
        """Check accesses against the last writes; `strong` ones may meet those of atomic operations."""
        old = record.writer[x.at]
        if strong:
            old = np.where(old < 0, 0, old)
        bad = self.unordered(old, record.wrote_at[x.at], record.writing_thread[x.at], x)
        self.check(machine, i, verbs, bad, old, x)

    def note_read(self, machine: Lockstep, i: int, part: Part, at: Array, size: int) -> None:
        """Check and note a load, which may be an atomic one, or the first guess of an atomic operation."""
        modifiers = set(machine.program.instructions[i].modifiers)
        ordered = "cta" not in modifiers and bool(modifiers & {"acquire", "relaxed", "volatile"})
        strong = ordered or i in machine.program.memory.guesses
        if ordered:
            self.synchronize(machine, part, at, size, acquire="acquire" in modifiers, release=None)
        x, record = self.places(machine, part, at, size)
        self.check_writer(machine, i, "reads wrote", record, x, strong)
        if strong:
            return
        old = record.reader[x.at]
        alone = (old == 0) | ((old == x.block) & (record.reading_thread[x.at] == x.thread))
        record.reading_thread[x.at] = np.where(alone, x.thread, -1)
        record.reader[x.at] = np.where((old == 0) | (old == x.block), x.block, MANY)
        record.reader[x.at[record.reader[x.at] != x.block]] = MANY
        record.reading_thread[x.at[record.reading_thread[x.at] != x.thread]] = -1
        record.read_at[x.at] = self.times(x.block)

    def note_write(self, machine: Lockstep, i: int, part: Part, at: Array, size: int) -> None:
        """Check and note a store, which may be an atomic one."""
        modifiers = set(machine.program.instructions[i].modifiers)
        strong = "cta" not in modifiers and bool(modifiers & {"release", "relaxed", "volatile"})
        self._note_write(machine, i, part, at, size, strong)
        if strong:
            self.synchronize(machine, part, at, size, acquire=None, release="release" in modifiers)

    def note_atomic(
        self, machine: Lockstep, i: int, part: Part, at: Array, size: int, order: str, scope: str, wrote: Array | None
    ) -> None:
        """Check and note an atomic operation. `wrote`: where it did; None: everywhere."""
        acquire, release = order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
        self._note_write(machine, i, part, at, size, scope != "cta")
        if scope != "cta":
            self.synchronize(machine, part, at, size, acquire, release, wrote)

    def _note_write(self, machine: Lockstep, i: int, part: Part, at: Array, size: int, strong: bool) -> None:
        x, record = self.places(machine, part, at, size)
        self.check_writer(machine, i, "writes wrote", record, x, strong)
        old = record.reader[x.at]
        bad = self.unordered(old, record.read_at[x.at], record.reading_thread[x.at], x)
        self.check(machine, i, "writes read", bad, old, x)
        old = record.writer[x.at]
        record.writer[x.at] = np.where((old < 0) & (old != -x.block), -MANY, -x.block) if strong else x.block
        record.wrote_at[x.at] = self.times(x.block)
        record.writing_thread[x.at] = x.thread
        record.reader[x.at] = 0
        other = np.abs(record.writer[x.at]) != x.block
        if strong:
            record.writer[x.at[other]] = -MANY
        else:
            self.check(machine, i, "writes writes", other, record.writer[x.at], x)

    def synchronize(
        self, machine: Lockstep, part: Part, at: Array, size: int, acquire: bool | None, release: bool | None,
        wrote: Any = None,
    ) -> None:  # fmt: skip
        """Pass on what threads know by way of an address, in their order; None: it is not read, or not written."""
        if not self.chains:
            return
        shape = (machine.blocks, machine.threads)
        held = np.ones(shape, bool) if part.mask is None else np.broadcast_to(part.mask, shape)
        at = np.broadcast_to(at, shape)
        writes = held if wrote is None else np.broadcast_to(wrote, shape) & held
        for n, thread in np.argwhere(held):
            block, address = int(machine.block_ids[n]) + 1, part.region.base + int(at[n, thread]) * size
            if acquire is not None:
                self.chains.acquire(block, int(thread), address, acquire)
            if release is not None and writes[n, thread]:
                self.chains.release(block, int(thread), address, release)

    def at_barrier(self, machine: Lockstep, fence: bool = False) -> None:
        """A barrier of the active blocks, or a fence."""
        if self.chains:
            active = machine.active
            for n in range(machine.blocks) if active is None else np.flatnonzero(active.any(1)):
                block = int(machine.block_ids[n]) + 1
                if fence:
                    self.chains.fence(block)
                else:
                    self.chains.at_barrier(block)
