"""Blocks of a grid that run in lockstep: their registers, and the control flow of their threads.

Registers are arrays [blocks, threads]; those that are the same for all threads of a block, or for all blocks, stay
[blocks, 1], [1, threads] or [1, 1]. Where all threads of all blocks take the same way, one call runs a basic block for
all of them. Where blocks part, each part becomes a machine of its own. Where threads of a block part, they run masked
until they meet again.

A thread's place is a basic block. Warps that advance on their own (barriers of some of the warps, mbarrier, bulk
copies) would come in here: `run_parted` already keeps a place for each thread, and would leave those that wait where
they are.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory.global_memory import GlobalMemory, Regions
from .memory.local_memory import LocalMemory
from .memory.regions import Region
from .memory.shared_memory import SharedMemory
from .program.ptx import END
from .program.translate import Program

Array = np.ndarray
u4, u8 = np.uint32, np.uint64
TURN = 256  # basic blocks that run before other blocks of the grid, or other threads of a block, do
DTYPES = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
GARBAGE = {1: False, 8: 0xDE, 16: 0xDEAD, 32: 0xDEADBEEF, 64: 0xDEADBEEFDEADBEEF}
UNWRITTEN = {bits: np.array([[value]], DTYPES[bits]) for bits, value in GARBAGE.items()}  # registers; never changed


@dataclass
class Findings:
    """The faults and the counters of a launch.

    faults    (kind, instruction) -> message
    counts    (instruction, counter) -> number
    entered   basic block -> warps that ran it
    """

    faults: dict[tuple[str, int], str] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    entered: Counter = field(default_factory=Counter)


class Accumulators:
    """Registers that wgmma computes, or reads, until a wait: by the number of their group."""

    def __init__(self) -> None:
        self.groups: dict[str, int] = {}
        self.committed = 0

    def begin(self, names: Sequence[str]) -> None:
        self.groups.update(dict.fromkeys(names, self.committed))

    def copy_register(self, name: str, source: str) -> None:
        if source in self.groups:
            self.groups[name] = self.groups[source]
        else:
            self.groups.pop(name, None)

    def forget(self, names: Sequence[str]) -> None:
        for name in names:
            self.groups.pop(name, None)

    def commit(self) -> None:
        self.committed += 1

    def wait(self, count: int) -> None:
        """All but the last `count` groups are complete."""
        self.groups = {name: group for name, group in self.groups.items() if group >= self.committed - count}

    def copy(self) -> Accumulators:
        new = Accumulators()
        new.groups, new.committed = dict(self.groups), self.committed
        return new


class Machine:
    """Some of the blocks of a launch.

    program        what they run
    params         parameter -> array [1, 1]
    regions        the memory that the launch may touch
    grid           blocks along x, y and z
    block_ids      the numbers of these blocks, counted along x first
    shared_bytes   of each block
    checks         watch for faults; counters: count what memory is asked for
    """

    def __init__(
        self,
        program: Program,
        params: dict[str, Array],
        regions: Regions | Iterable[Region],
        grid: tuple[int, int, int],
        block_ids: Array,
        shared_bytes: int,
        findings: Findings,
        checks: bool = True,
        counters: bool = True,
    ):
        self.program, self.params, self.grid, self.findings = program, params, grid, findings
        self.checks, self.counters, self.shared_bytes = checks, counters, shared_bytes
        self.counts = findings.counts
        self.threads = program.kernel.threads
        self.warps = -(-self.threads // 32)
        self.block_ids, self.blocks = block_ids, len(block_ids)
        x, y, _ = grid
        places = block_ids % x, block_ids // x % y, block_ids // (x * y)
        self.ctaid = [place.astype(u4)[:, None] for place in places]
        self.tid = np.arange(self.threads, dtype=u4)[None]
        self.lane, self.warp = self.tid & u4(31), self.tid >> u4(5)
        self.active: Array | None = None
        self.accumulators = Accumulators()
        self.registers: list[Array] = [UNWRITTEN[bits] for bits in program.registers]
        self.ticks = itertools.count()
        self.global_memory = GlobalMemory(self, regions)
        self.shared_memory = SharedMemory(self, shared_bytes)
        self.local_memory = LocalMemory(self, program.kernel.local_bytes)

    @property
    def multiprocessor(self) -> Array:
        return (self.block_ids % 128).astype(u4)[:, None]

    def clock(self) -> int:
        """A number that grows with every call."""
        return 1000 * next(self.ticks)

    def select(self, keep: Array) -> Machine:
        """A machine of some of the blocks. keep: bool [blocks]"""
        new = object.__new__(Machine)
        new.__dict__.update(self.__dict__)
        new.blocks = int(keep.sum())
        new.block_ids = self.block_ids[keep]
        new.ctaid = [place[keep] for place in self.ctaid]
        new.registers = [r[keep] if len(r) > 1 else r for r in self.registers]
        new.accumulators = self.accumulators.copy()
        new.global_memory = self.global_memory.select(new, keep)
        new.shared_memory = self.shared_memory.select(new, keep)
        new.local_memory = self.local_memory.select(new, keep)
        return new

    # ---- control flow

    def run(self) -> None:
        """Run all blocks to their end."""
        run_by_turns([(self, 0)])

    def run_basic_block(self, place: int) -> list[Way]:
        """Run a basic block; returns the one that comes next, and where blocks of the grid part, a machine for each."""
        code = self.program.blocks[place]
        self.findings.entered[place] += self.blocks * self.warps
        taken = code.run(self, self.registers)
        target = place + 1 if code.block.target is None else code.block.target
        if taken is None:
            return [(self, target)]
        every, some = taken.all(1), taken.any(1)
        if every.all():
            return [(self, target)]
        if not some.any():
            return [(self, place + 1)]
        if (some == every).all():
            some = np.broadcast_to(some, (self.blocks,))
            return [(self.select(some), target), (self.select(~some), place + 1)]
        return [(self, self.run_parted(code.meeting, np.where(taken, target, place + 1)))]

    def run_parted(self, meeting: int, places: Array) -> int:
        """Run threads that have parted until all are at `meeting`; returns that.

        places   the basic block that each thread comes to next, END behind the last
        Of the places that are not the meeting point the first runs, those with a barrier last; but one that has had
        its turn often lets the others run, since its threads may wait for what theirs write.
        """
        end = len(self.program.blocks)
        meeting = end if meeting == END else meeting
        places = np.broadcast_to(np.where(places == END, end, places), (self.blocks, self.threads)).copy()
        turns: Counter[int] = Counter()
        while True:
            waiting = np.unique(places)
            ready = [int(n) for n in waiting if n not in (meeting, end)]
            if not ready:
                break
            place = min(ready, key=lambda n: (self.program.blocks[n].has_barrier, turns[n] // TURN, n))
            turns[place] += 1
            code = self.program.blocks[place]
            active = places == place
            self.active = active
            self.findings.entered[place] += int(self.by_warp(active, False).any(2).sum())
            taken = code.run(self, self.registers)
            target = place + 1 if code.block.target is None else code.block.target
            onward = end if target == END else target
            if taken is not None:
                onward = np.where(np.broadcast_to(taken, active.shape), onward, place + 1)[active]
            places[active] = onward
        self.active = None
        return END if meeting == end else meeting

    # ---- threads of warps

    def by_warp(self, x: Array, fill: Any = 0) -> Array:
        """[blocks, warps, 32] of a register; lanes that a last warp lacks hold `fill`."""
        x = np.broadcast_to(x, (self.blocks, self.threads))
        if self.threads % 32:
            x = np.pad(x, ((0, 0), (0, -self.threads % 32)), constant_values=fill)
        return x.reshape(self.blocks, self.warps, 32)

    def by_thread(self, x: Array) -> Array:
        """The register of values [blocks, warps, 32 or 1]."""
        whole = np.broadcast_to(x, (self.blocks, self.warps, 32))
        return np.ascontiguousarray(whole).reshape(self.blocks, -1)[:, : self.threads]

    def count_warps(self, mask: Array | None) -> int:
        """The warps of which a thread runs."""
        if mask is None and self.active is None:
            return self.blocks * self.warps
        runs = self.running(mask)
        return int(self.by_warp(runs, False).any(2).sum())

    def running(self, mask: Array | None) -> Array:
        """The threads that run and whose guard is true."""
        runs = np.ones((1, 1), bool) if self.active is None else self.active
        return runs if mask is None else runs & mask

    def present(self, i: int | None, mask: Array | None, members: Array | None) -> Array | None:
        """As `lanes_present`, but None if those are all."""
        self.shared_memory.converge()
        if mask is None and self.active is None and members is None and self.threads % 32 == 0:
            return None
        return self.lanes_present(i, mask, members)

    def lanes_present(self, i: int | None, mask: Array | None, members: Array | None) -> Array:
        """[blocks, warps, 32]: the threads that run an instruction together.

        A thread that its mask of lanes names and that does not run it is a fault, and so is one that is not named.
        """
        self.shared_memory.converge()
        runs = self.by_warp(self.running(mask), False)
        if members is None:
            named = np.broadcast_to(self.by_warp(np.ones((1, 1), bool), False), runs.shape)
        else:
            named = (self.by_warp(members) >> np.arange(32, dtype=u4)) & u4(1) == 1
        if i is not None:
            missing = (named != runs) & runs.any(2, keepdims=True)
            if missing.any():
                text = "lanes that its mask names do not reach this instruction, or others do"
                self.fault(i, "barrier", text, self.by_thread(missing))
        return runs

    def check_lanes(self, i: int, present: Array, origin: Array) -> None:
        """A fault where a lane that runs reads from one that does not."""
        read = np.take_along_axis(present, np.broadcast_to(origin, present.shape), 2)
        bad = present & ~read
        if bad.any():
            self.fault(i, "register unwritten", "reads from a lane that does not run this", self.by_thread(bad))

    # ---- faults

    def check_written(self, i: int, written: Array, mask: Array | None) -> None:
        """A fault where a thread reads a register that it has not written."""
        if not written.all():
            bad = ~written & self.running(mask)
            if bad.any():
                self.fault(i, "register unwritten", "reads a register that nothing has written", bad)

    def check_awaited(
        self, i: int, names: Sequence[str], mask: Array | None, what: str = "reads an accumulator"
    ) -> None:
        """A fault where a register is read that wgmma may still be computing, or written that it may be reading."""
        if any(name in self.accumulators.groups for name in names):
            self.fault(i, "not waited for", f"{what} of wgmma before its wait", self.running(mask))

    def fault(self, i: int, kind: str, message: str, bad: Array | None = None) -> None:
        """Note a fault of an instruction, once for each kind. bad: the threads it concerns"""
        if (kind, i) in self.findings.faults:
            return
        if bad is not None:
            bad = np.broadcast_to(bad, (self.blocks, self.threads))
            block, thread = np.argwhere(bad)[0]
            place = tuple(int(axis[block, 0]) for axis in self.ctaid)
            count = int(bad.sum())
            message += f" (block {place}, thread {thread}{f'; {count} threads in all' if count > 1 else ''})"
        self.findings.faults[kind, i] = message


Way = tuple[Machine, int]  # blocks of the grid, and the basic block that they come to next


def run_by_turns(ways: Iterable[Way], patience: float = math.inf) -> list[Way]:
    """Run blocks of the grid to their end, by turns where they take different ways, as one may wait for another.

    patience  basic blocks that may run of those with atomics. Then blocks may be waiting for some that have not begun,
              and the ways that have not ended are returned.
    """
    work = deque(ways)
    while work and patience > 0:
        machine, place = work.popleft()
        ways = [(machine, place)]
        for _ in range(TURN):
            patience -= machine.program.blocks[place].may_wait
            ways = machine.run_basic_block(place)
            place = ways[0][1]
            if len(ways) > 1 or place == END:
                break
        work += [way for way in ways if way[1] != END]
    return list(work)
