"""Chains of release and acquire between blocks: which accesses of others a thread knows to have happened.

A block's time counts its barriers and releases. A release by a thread passes on what its block had done by its last
barrier, what the thread itself has done since, and what it knows of others. An acquire gives that to a thread, and the
next barrier gives it to all threads of its block. A fence makes a relaxed write behind it a release and a relaxed read
before it an acquire, for the whole block: it is not asked whose fence it is.
"""

import numpy as np

Clock = dict[int | tuple[int, int], int]  # a block, or a thread of it -> the time up to which its accesses are known


def join(clock: Clock, other: Clock) -> None:
    """Add what another clock knows."""
    for who, time in other.items():
        if clock.get(who, 0) < time:
            clock[who] = time


class ReleaseChains:
    """The time of each block, and what its threads know.

    known      block -> what all its threads know
    thread     block -> thread -> what it has acquired since the last barrier
    released   address -> what those knew who released it
    observed   block -> what its relaxed reads would have told, had a fence followed
    fenced     block -> what it knew at its last fence
    """

    def __init__(self) -> None:
        self.time: dict[int, int] = {}
        self.barrier: dict[int, int] = {}
        self.known: dict[int, Clock] = {}
        self.thread: dict[int, dict[int, Clock]] = {}
        self.released: dict[int, Clock] = {}
        self.observed: dict[int, Clock] = {}
        self.fenced: dict[int, Clock] = {}

    def times(self, block: np.ndarray) -> np.ndarray:
        """The present time of each of the blocks."""
        numbers, inverse = np.unique(block, return_inverse=True)
        return np.array([self.time.get(int(b), 1) for b in numbers], np.int32)[inverse]

    def at_barrier(self, block: int) -> None:
        """All threads of a block meet."""
        for clock in self.thread.pop(block, {}).values():
            join(self.known.setdefault(block, {}), clock)
        self.time[block] = self.barrier[block] = self.time.get(block, 1) + 1

    def knows_any(self, block: int) -> bool:
        """True if a block has heard of others."""
        return bool(self.known.get(block) or self.thread.get(block))

    def knows(self, block: int, thread: int, other: int, other_thread: int, time: int) -> bool:
        """True if a thread knows an access that another block's made at that time; of a thread -1 it is any."""
        clocks = self.known.get(block, {}), self.thread.get(block, {}).get(thread, {})
        whole = max(clock.get(other, 0) for clock in clocks)
        return max(whole, *(clock.get((other, other_thread), 0) for clock in clocks)) >= time

    def acquire(self, block: int, thread: int, address: int, strong: bool) -> None:
        """A thread reads what others released; without `strong` it counts once a fence follows."""
        if address in self.released:
            own = self.thread.setdefault(block, {}).setdefault(thread, {}) if strong else None
            join(self.observed.setdefault(block, {}) if own is None else own, self.released[address])

    def release(self, block: int, thread: int, address: int, strong: bool) -> None:
        """A thread writes what others may acquire; without `strong` it counts if a fence came before."""
        passed = self.released.setdefault(address, {})
        if not strong:
            return join(passed, self.fenced.get(block, {}))
        join(passed, self.known.get(block, {}))
        join(passed, self.thread.get(block, {}).get(thread, {}))
        now = self.time.setdefault(block, 1)
        join(passed, {block: self.barrier.get(block, 1) - 1, (block, thread): now})
        self.time[block] = now + 1

    def fence(self, block: int) -> None:
        """A fence of a block, to both sides."""
        known = self.known.setdefault(block, {})
        join(known, self.observed.pop(block, {}))
        for clock in self.thread.get(block, {}).values():
            join(known, clock)
        now = self.time.setdefault(block, 1)
        self.fenced[block] = {**known, block: now}
        self.time[block] = now + 1
