"""Races between the blocks of a grid: two that touch the same bytes of global memory, of which one writes them.

Blocks run in any order on a GPU. What one wrote another may touch only behind a chain of a release and an acquire:
atomics of that order, or others with a fence before or behind. The chain is followed by a clock for each block, which
counts its releases, and by what each block knows of the clocks of the others.
"""

from typing import Any

import numpy as np

from .lockstep import Lockstep
from .regions import Part, Region

Array = np.ndarray
MANY = 2**30  # readers, or with a minus writers by atomics
Clock = dict[int, int]  # block -> the count of its releases that is known of


class BlockRaces:
    """Which blocks wrote and read each unit of some regions.

    A unit's writer is block + 1, with a minus if it wrote by an atomic; 0 is none.
    """

    def __init__(self, regions: set[Region], unit: int):
        self.regions, self.unit = regions, unit
        self.records: dict[Region, list[Array]] = {}  # writer, its clock then, reader, its clock then
        self.clocks: dict[int, Clock] = {}  # what each block knows
        self.released: dict[int, Clock] = {}  # what each block knew at the address
        self.observed: dict[int, Clock] = {}  # what a fence of the block would make it know
        self.fenced: dict[int, Clock] = {}  # what the block knew at its last fence

    def places(self, machine: Lockstep, part: Part, at: Array, size: int) -> tuple[Array, Array, list]:
        """The units that an access touches, the block that does, and their record."""
        if part.region not in self.records:
            units = len(part.region.views[1]) // self.unit
            self.records[part.region] = [np.zeros(units, np.int32) for _ in range(4)]
            self.regions.add(part.region)
        shape = (machine.blocks, machine.threads)
        block = np.broadcast_to((machine.block_ids + 1).astype(np.int32)[:, None], shape)
        at = np.broadcast_to(at, shape)
        if part.mask is not None:
            held = np.broadcast_to(part.mask, shape)
            at, block = at[held], block[held]
        each = max(1, size // self.unit)
        return (
            (at.reshape(-1, 1) * each + np.arange(each)).ravel(),
            block.ravel().repeat(each),
            self.records[part.region],
        )

    def own_clock(self, block: Array) -> Array:
        """The count of releases of each of the blocks."""
        if not self.clocks:
            return np.ones(1, np.int32)
        numbers, inverse = np.unique(block, return_inverse=True)
        return np.array([self.clocks.get(int(b), {}).get(int(b), 1) for b in numbers], np.int32)[inverse]

    def unordered(self, old: Array, when: Array, block: Array) -> Array:
        """Which of the accesses by `old` at its clock `when` are not known to `block`."""
        bad = (old != 0) & (np.abs(old) != block)
        if self.clocks and bad.any():
            for n in np.flatnonzero(bad):
                knows = self.clocks.get(int(block[n]), {})
                other = abs(int(old[n]))
                bad[n] = len(knows) < 2 if other == MANY else knows.get(other, 0) < when[n]
        return bad

    def fault(self, machine: Lockstep, i: int, text: str, old: Array, block: Array) -> None:
        other = abs(int(old[0]))
        other = "others" if other == MANY else f"block {other - 1}"
        bad = (machine.block_ids + 1 == block[0])[:, None]
        machine.fault(i, "blocks race", f"block {block[0] - 1} {text.format(other)}; {len(old)} such places", bad)

    def note_read(self, machine: Lockstep, i: int, part: Part, at: Array, size: int) -> None:
        """Check and note a load, which may be an atomic one."""
        modifiers = set(getattr(machine.program.instructions[i], "modifiers", ()))
        strong = modifiers & {"acquire", "relaxed", "volatile"}
        if strong:
            self.synchronize(machine, part, at, size, acquire="acquire" in modifiers, release=None)
        at, block, (writer, wrote_at, reader, read_at) = self.places(machine, part, at, size)
        old = writer[at]
        bad = self.unordered(np.where(old < 0, 0, old) if strong else old, wrote_at[at], block)
        if bad.any():
            self.fault(machine, i, "reads what {} wrote in this launch, and nothing orders them", old[bad], block[bad])
        if strong:
            return
        old = reader[at]
        reader[at] = np.where((old == 0) | (old == block), block, MANY)
        reader[at[(reader[at] != block)]] = MANY
        read_at[at] = self.own_clock(block)

    def note_write(self, machine: Lockstep, i: int, part: Part, at: Array, size: int) -> None:
        """Check and note a store, which may be an atomic one."""
        modifiers = set(getattr(machine.program.instructions[i], "modifiers", ()))
        strong = bool(modifiers & {"release", "relaxed", "volatile"})
        self._note_write(machine, i, part, at, size, strong)
        if strong:
            self.synchronize(machine, part, at, size, acquire=None, release="release" in modifiers)

    def note_atomic(
        self, machine: Lockstep, i: int, part: Part, at: Array, size: int, order: str, wrote: Array | None
    ) -> None:
        """Check and note an atomic operation. `wrote`: where it did; None: everywhere."""
        self._note_write(machine, i, part, at, size, True)
        acquire, release = order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
        self.synchronize(machine, part, at, size, acquire, release, wrote)

    def _note_write(self, machine: Lockstep, i: int, part: Part, at: Array, size: int, strong: bool) -> None:
        at, block, (writer, wrote_at, reader, read_at) = self.places(machine, part, at, size)
        old = writer[at]
        if strong:
            old = np.where(old < 0, 0, old)
        bad = self.unordered(old, wrote_at[at], block)
        if bad.any():
            self.fault(machine, i, "writes what {} wrote in this launch, and nothing orders them", old[bad], block[bad])
        old = reader[at]
        bad = self.unordered(old, read_at[at], block)
        if bad.any():
            self.fault(machine, i, "writes what {} read in this launch, and nothing orders them", old[bad], block[bad])
        old = writer[at]
        writer[at] = np.where((old < 0) & (old != -block), -MANY, -block) if strong else block
        wrote_at[at] = self.own_clock(block)
        reader[at] = 0
        other = np.abs(writer[at]) != block
        if other.any() and strong:
            writer[at[other]] = -MANY
        elif other.any():
            text = "writes what {} writes at the same time, and nothing orders them"
            self.fault(machine, i, text, writer[at][other], block[other])

    def synchronize(
        self, machine: Lockstep, part: Part, at: Array, size: int, acquire: bool | None, release: bool | None,
        wrote: Any = None,
    ) -> None:  # fmt: skip
        """Pass on what blocks know of each other by way of an address; None: it is not read, or not written."""
        shape = (machine.blocks, machine.threads)
        held = np.ones(shape, bool) if part.mask is None else np.broadcast_to(part.mask, shape)
        at = np.broadcast_to(at, shape)
        writes = held if wrote is None else np.broadcast_to(wrote, shape) & held
        for n in np.flatnonzero(held.any(1)):
            block = int(machine.block_ids[n]) + 1
            known = self.clocks.setdefault(block, {block: 1})
            for unit in np.unique(at[n][held[n]]):
                address = part.region.base + int(unit) * size
                if acquire is not None and address in self.released:
                    join(known if acquire else self.observed.setdefault(block, {}), self.released[address])
            if release is None:
                continue
            passed = known if release else self.fenced.get(block)
            units = np.unique(at[n][writes[n]])
            if passed and len(units):
                for unit in units:
                    join(self.released.setdefault(part.region.base + int(unit) * size, {}), passed)
                if release:
                    known[block] += 1

    def fence(self, machine: Lockstep) -> None:
        """A fence of the active blocks, to both sides."""
        active = machine.active
        for n in range(machine.blocks) if active is None else np.flatnonzero(active.any(1)):
            block = int(machine.block_ids[n]) + 1
            known = self.clocks.setdefault(block, {block: 1})
            join(known, self.observed.pop(block, {}))
            self.fenced[block] = dict(known)
            known[block] += 1


def join(known: Clock, other: Clock) -> None:
    """Add what `other` knows."""
    for block, count in other.items():
        if known.get(block, 0) < count:
            known[block] = count
