"""The history of shared memory: who wrote and read each granule since which barrier, and what that forbids.

Time is counted in barriers of any kind. While all blocks of a machine do the same, they share one row of history.
What nothing orders is a fault by PTX's memory model, with one allowance: instructions that a warp executes together
(shuffles, ldmatrix, votes) count as an order of its threads, as they are on every GPU that there is.

Warps that advance on their own would have a time of their last barrier each, in place of `barrier`: a named barrier or
an mbarrier sets it for the warps that it releases.
"""

from __future__ import annotations

import numpy as np

from .lockstep import Lockstep
from .shared_access import ATOMIC, SEVERAL, WARP, Access

ARRAYS = ("written", "writer", "read", "reader", "copying", "streaming")


class SharedHistory:
    """granule: bytes that every access is a multiple of; granules: how many a block has."""

    def __init__(self, machine: Lockstep, granule: int, granules: int):
        self.machine, self.granule, self.granules = machine, granule, granules
        self.rows = 1
        self.written = np.zeros(granules, np.int32)  # time of the last write; 0: none
        self.writer = np.zeros(granules, np.int16)
        self.read = np.zeros(granules, np.int32)
        self.reader = np.zeros(granules, np.int16)
        self.copying = np.zeros(granules, np.int16)  # copies of cp.async under way
        self.streaming = np.zeros(granules, np.int16)  # wgmma that may still be reading
        self.copies = self.streams = 0  # accesses of those two kinds
        self.time = 1
        self.barrier = np.ones((1, 1), np.int32)  # time of the last barrier [1 or blocks, 1]
        self.converged = np.ones((1, machine.warps), np.int32)  # time of the last order within a warp
        self.fence = np.ones((1, 1), np.int32)  # time of the last proxy fence

    def select(self, machine: Lockstep, keep: np.ndarray) -> SharedHistory:
        """The history of some of the blocks."""
        new = object.__new__(SharedHistory)
        new.__dict__.update(self.__dict__, machine=machine)
        for name in ARRAYS:
            old = getattr(self, name)
            setattr(new, name, old.copy() if self.rows == 1 else old.reshape(self.rows, -1)[keep].ravel())
        for name in ("barrier", "converged", "fence"):
            old = getattr(self, name)
            setattr(new, name, old.copy() if len(old) == 1 else old[keep])
        new.rows = 1 if self.rows == 1 else int(keep.sum())
        return new

    # ---- order
    def next_time(self, names: tuple[str, ...]) -> None:
        """A barrier of the active threads: times of these names become the present."""
        self.time += 1
        active = self.machine.active
        if active is None:
            for name in names:
                getattr(self, name).fill(self.time)
            return
        warps = np.logical_or.reduceat(active, np.arange(0, self.machine.threads, 32), axis=1)
        for name in names:
            old = getattr(self, name)
            mask = warps if name == "converged" else np.any(active, axis=1, keepdims=True)
            setattr(self, name, np.where(mask, np.int32(self.time), old))

    def places(self, access: Access) -> tuple[np.ndarray, np.ndarray]:
        """The granules of an access in the rows of this history, and who touches each."""
        at, who = access.touched(self.granule, self.granules)
        if access.rows == self.rows:
            return at, who
        if self.rows == 1:
            for name in ARRAYS:
                setattr(self, name, np.tile(getattr(self, name), access.rows))
            self.rows = access.rows
            return at, who
        return (at + np.arange(self.rows)[:, None] * self.granules).ravel(), np.tile(who, self.rows)

    def last_time(self, name: str, at: np.ndarray, warp: np.ndarray | None = None) -> np.ndarray:
        """The time of the last barrier of that name for each of the granules."""
        times = getattr(self, name)
        row = 0 if len(times) == 1 else at // self.granules
        return times[row, 0 if warp is None else warp]

    def unordered(self, at: np.ndarray, when: np.ndarray, old: np.ndarray, who: np.ndarray) -> np.ndarray | None:
        """Which accesses nothing orders with the present one: by other threads since the barrier that would."""
        recent = when >= self.last_time("barrier", at)
        if not recent.any():
            return None
        n = np.flatnonzero(recent)
        a, b, t = old[n].astype(np.int64), who[n].astype(np.int64), when[n]
        warp_a, warp_b = (np.where(x >= WARP, x - WARP, x >> 5) for x in (a, b))
        same = (warp_a == warp_b) & (a < SEVERAL) & (b < SEVERAL)
        ordered = (a == b) & (a < WARP)
        ordered |= same & (t < self.last_time("converged", at[n], np.where(same, warp_b, 0)))
        n = n[~ordered]
        return n if len(n) else None

    # ---- accesses
    def fault(self, i: int, kind: str, text: str, at: np.ndarray) -> None:
        """A fault about granules, of which the first is named."""
        block, granule = divmod(int(at[0]), self.granules)
        bad = None
        if self.rows > 1:
            bad = np.zeros((self.rows, 1), bool)
            bad[block] = True
        count = f"; {len(at) * self.granule} bytes in all" if len(at) > 1 else ""
        self.machine.fault(i, kind, text.format(f"shared byte {granule * self.granule}") + count, bad)

    def race(self, i: int, at: np.ndarray, who: np.ndarray, verb: str, old: np.ndarray, past: str) -> None:
        """A fault of granules that `who` and `old` touch, of whom one writes."""
        text = f"{verb} {{}} ({describe(who[0])}), which {describe(old[0])} {past} since the last barrier"
        self.fault(i, "race", text, at)

    def note_read(self, i: int, access: Access) -> None:
        """Check and note that the access reads."""
        at, who = self.places(access)
        self.check_read(i, at, who, "reads")
        old, when = self.reader[at], self.read[at]
        recent = when >= self.last_time("barrier", at)
        if recent.any():
            other = recent & (old != who)
            if other.any():
                a, b = old[other].astype(np.int64), who[other].astype(np.int64)
                warp_a, warp_b = (np.where(x >= WARP, x - WARP, x >> 5) for x in (a, b))
                same = (warp_a == warp_b) & (a < SEVERAL) & (b < SEVERAL)
                fresh = when[other] >= self.last_time("converged", at[other], np.where(same, warp_b, 0))
                who = who.copy()
                who[other] = np.where(same, np.where(fresh, WARP + warp_b, b), SEVERAL)
        self.reader[at] = who
        self.read[at] = self.time

    def check_read(self, i: int, at: np.ndarray, who: np.ndarray, verb: str) -> None:
        """Faults of reading these granules."""
        when = self.written[at]
        if not len(when):
            return
        if not when.min():
            bad = at[(when == 0) & (self.copying[at] == 0)] if self.copies else at[when == 0]
            if len(bad):
                self.fault(i, "shared memory unwritten", verb + " {}, which nothing wrote", bad)
        if (n := self.unordered(at, when, self.writer[at], who)) is not None:
            self.race(i, at[n], who[n], verb, self.writer[at[n]], "wrote")
        if self.copies and (busy := self.copying[at] > 0).any():
            self.fault(i, "not waited for", verb + " {}, to which cp.async may still be copying", at[busy])

    def note_write(self, i: int, access: Access, copy: bool = False) -> np.ndarray | None:
        """Check and note that the access writes, by cp.async if `copy`.

        Returns the granules that another thread wrote, unordered with this: a race unless the values are the same.
        """
        at, who = self.places(access)
        if (n := self.unordered(at, self.read[at], self.reader[at], who)) is not None:
            self.race(i, at[n], who[n], "writes", self.reader[at[n]], "read")
        if self.copies and (busy := self.copying[at] > 0).any():
            self.fault(i, "not waited for", "writes {}, to which cp.async may still be copying", at[busy])
        if self.streams and (busy := self.streaming[at] > 0).any():
            self.fault(i, "not waited for", "writes {}, which wgmma may still be reading", at[busy])
        n = self.unordered(at, self.written[at], self.writer[at], who)
        conflict = None if n is None else at[n]
        if copy:
            self.copying[at] += 1
            self.copies += 1
            return conflict
        self.written[at] = self.time
        self.writer[at] = who
        if conflict is not None:
            self.writer[conflict] = SEVERAL
        return conflict

    def note_atomic(self, i: int, access: Access) -> None:
        """Check and note an atomic operation, which other atomic operations may meet."""
        at, who = self.places(access)
        when, old = self.written[at], self.writer[at]
        if len(when) and not when.min():
            self.fault(i, "shared memory unwritten", "updates {}, which nothing wrote", at[when == 0])
        for verb, time, other in (("read", self.read[at], self.reader[at]), ("wrote", when, old)):
            n = self.unordered(at, time, np.where(other == ATOMIC, who, other), who)
            n = n if n is None else n[other[n] != ATOMIC]
            if n is not None and len(n):
                self.race(i, at[n], who[n], "updates", other[n], verb)
        self.written[at] = self.time
        self.writer[at] = ATOMIC

    def bytes_of(self, memory: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The bytes of granules, in every block if all share a row: [blocks, granules, bytes] or [granules, bytes]."""
        granules = memory.reshape(len(memory), self.granules, self.granule)
        return granules[:, at] if self.rows == 1 else granules[at // self.granules, at % self.granules]

    def check_same(self, i: int, before: np.ndarray, after: np.ndarray, at: np.ndarray) -> None:
        """A race, where a write changes granules that another thread wrote, unordered with it."""
        if (changed := (before != after).any(-1)).any():
            bad = at[changed.any(0)] if changed.ndim > 1 else at[changed]
            self.fault(i, "race", "writes {}, where another thread wrote a different value since the last barrier", bad)

    def end_copy(self, access: Access) -> None:
        """A copy of cp.async has been waited for by the threads that asked for it."""
        at, who = self.places(access)
        self.copies -= 1
        self.copying[at] -= 1
        self.written[at] = self.time
        self.writer[at] = who

    def begin_stream(self, i: int, access: Access) -> None:
        """Check and note that wgmma begins to read."""
        at, who = self.places(access)
        self.check_read(i, at, who, "wgmma reads")
        when = self.written[at]
        late = (when > 0) & (when >= self.last_time("fence", at))
        if late.any():
            self.fault(i, "no proxy fence", "wgmma reads {}, written since the last fence.proxy.async", at[late])
        self.streaming[at] += 1
        self.streams += 1

    def end_stream(self, access: Access) -> None:
        """A wgmma has been waited for."""
        at, who = self.places(access)
        self.streams -= 1
        self.streaming[at] -= 1
        self.read[at] = self.time
        self.reader[at] = who


def describe(code: int) -> str:
    """In words who touched a granule."""
    if code >= SEVERAL:
        return "several warps" if code == SEVERAL else "an atomic operation"
    return f"several threads of warp {code - WARP}" if code >= WARP else f"thread {code} of warp {code >> 5}"
