"""The instructions that keep two accesses of shared memory apart, computed from what a correct run accessed.

`find_separators` replays the log of a run once for each barrier, wait and fence, as if that instruction were not
there. Where the replay meets a conflict, the instruction separates accesses, and dropping it is a fault that a check
must find. It knows nothing of how the emulator checks: this is a second opinion, in as few lines as it takes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal[
    "read",
    "write",
    "copy",
    "tensor core read",
    "barrier",
    "warp barrier",
    "proxy fence",
    "copies committed",
    "copies awaited",
    "products committed",
    "products awaited",
]
SYNCHRONIZING: Collection[Kind] = {"barrier", "warp barrier", "proxy fence", "copies awaited", "products awaited"}
NOBODY, SEVERAL = -1, -2


@dataclass(frozen=True)
class Event:
    """The accesses of one instruction to shared memory in some blocks of a grid.

    instruction  its id
    blocks       [b] the numbers of the blocks
    row, byte    [n] of the bytes accessed: the index in `blocks` of the block, and the address
    thread       [n] the thread that accesses each; SEVERAL where those of its warp do so together
    warp         [n] its warp; SEVERAL where a group of warps does so together
    pending      of waits: the number of groups that need not be complete
    """

    kind: Kind
    instruction: int
    blocks: np.ndarray
    row: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    byte: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    thread: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    warp: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    pending: int = 0


class Owners:
    """Who accessed each byte [blocks, bytes] since the last barrier: a warp, and a thread of it.

    thread is NOBODY where a warp barrier came since, as the threads of that warp are in order again.
    """

    def __init__(self, shape: tuple[int, int]):
        self.warp, self.thread = np.full(shape, NOBODY), np.full(shape, NOBODY)

    def conflict(self, at: tuple[np.ndarray, np.ndarray], event: Event) -> bool:
        """True if another thread accessed one of the bytes."""
        warp, thread = self.warp[at], self.thread[at]
        same_warp = (warp == event.warp) & (warp != SEVERAL)
        same_thread = (thread == NOBODY) | ((thread == event.thread) & (thread != SEVERAL))
        return bool(((warp != NOBODY) & ~(same_warp & same_thread)).any())

    def add(self, at: tuple[np.ndarray, np.ndarray], thread: np.ndarray, warp: np.ndarray) -> None:
        """Adds accesses; bytes that several threads accessed, in this event or before, belong to several."""
        for owner, who in ((self.warp, warp), (self.thread, thread)):
            known = owner[at]
            owner[at] = np.where((known == NOBODY) | (known == who), who, SEVERAL)
            several = owner[at] != who  # accessed before by another, or in this event: then the last one stands there
            owner[at[0][several], at[1][several]] = SEVERAL

    def forget(self, blocks: np.ndarray) -> None:
        self.warp[blocks] = self.thread[blocks] = NOBODY


class Replay:
    """Shared memory of `num_blocks` blocks, as a log of events leaves it. conflicts: descriptions, by kind."""

    def __init__(self, num_blocks: int, num_bytes: int):
        shape = (num_blocks, num_bytes)
        self.readers, self.writers = Owners(shape), Owners(shape)
        self.copying, self.multiplying = np.zeros(shape, int), np.zeros(shape, int)  # group; 0: none
        self.copier = Owners(shape)
        self.copy_groups, self.product_groups = np.zeros(num_blocks, int), np.zeros(num_blocks, int)  # committed
        self.unfenced = np.zeros(shape, bool)
        self.conflicts: set[tuple[str, int]] = set()

    def note(self, conflict: bool | np.bool, kind: str, event: Event) -> None:
        if conflict:
            self.conflicts.add((kind, event.instruction))

    def run(self, events: Sequence[Event], without: int | None = None) -> set[tuple[str, int]]:
        """Replays all events but those of one instruction; returns the conflicts: (kind, instruction that met it)."""
        for event in events:
            if event.instruction != without or event.kind not in SYNCHRONIZING:
                getattr(self, event.kind.replace(" ", "_"))(event)
        return self.conflicts

    def places(self, event: Event) -> tuple[np.ndarray, np.ndarray]:
        return event.blocks[event.row], event.byte

    def read(self, event: Event) -> None:
        at = self.places(event)
        self.note(self.writers.conflict(at, event), "read of what another thread wrote", event)
        self.note(self.copying[at].any(), "read of what is being copied", event)
        self.readers.add(at, event.thread, event.warp)

    def write(self, event: Event) -> None:
        at = self.places(event)
        self.check_write(at, event)
        self.writers.add(at, event.thread, event.warp)
        self.unfenced[at] = True

    def check_write(self, at: tuple[np.ndarray, np.ndarray], event: Event) -> None:
        self.note(self.readers.conflict(at, event), "write of what another thread read", event)
        self.note(self.writers.conflict(at, event), "write of what another thread wrote", event)
        self.note(self.copying[at].any(), "write of what is being copied", event)
        self.note(self.multiplying[at].any(), "write of what a tensor core reads", event)

    def copy(self, event: Event) -> None:
        at = self.places(event)
        self.check_write(at, event)
        self.copying[at] = self.copy_groups[at[0]] + 1
        self.copier.warp[at], self.copier.thread[at] = event.warp, event.thread

    def tensor_core_read(self, event: Event) -> None:
        at = self.places(event)
        self.note(bool((self.writers.warp[at] != NOBODY).any()), "read of what another thread wrote", event)
        self.note(self.copying[at].any(), "read of what is being copied", event)
        self.note(self.unfenced[at].any(), "read without a proxy fence", event)
        self.multiplying[at] = self.product_groups[at[0]] + 1

    def barrier(self, event: Event) -> None:
        self.readers.forget(event.blocks)
        self.writers.forget(event.blocks)

    def warp_barrier(self, event: Event) -> None:
        for owners in (self.readers, self.writers):
            owners.thread[event.blocks] = np.where(owners.warp[event.blocks] == SEVERAL, SEVERAL, NOBODY)

    def proxy_fence(self, event: Event) -> None:
        self.unfenced[event.blocks] = False

    def copies_committed(self, event: Event) -> None:
        self.copy_groups[event.blocks] += 1

    def copies_awaited(self, event: Event) -> None:
        """Copied bytes are written now, by the thread that copied it."""
        landed = self.landed(self.copying, self.copy_groups, event)
        block, byte = np.nonzero(landed)
        at = (block, byte)
        self.writers.add(at, self.copier.thread[at], self.copier.warp[at])
        self.copying[at], self.unfenced[at] = 0, True

    def products_committed(self, event: Event) -> None:
        self.product_groups[event.blocks] += 1

    def products_awaited(self, event: Event) -> None:
        """Operands of products are read now, by warps each of which has waited for its own part only."""
        block, byte = np.nonzero(self.landed(self.multiplying, self.product_groups, event))
        several = np.full(block.shape, SEVERAL)
        self.readers.add((block, byte), several, several)
        self.multiplying[block, byte] = 0

    def landed(self, group: np.ndarray, groups: np.ndarray, event: Event) -> np.ndarray:
        """The bytes [blocks, bytes] of groups that the event waits for."""
        complete = (group > 0) & (group <= groups[:, None] - event.pending)
        mine = np.zeros(len(groups), bool)
        mine[event.blocks] = True
        return complete & mine[:, None]


def find_separators(events: Sequence[Event], num_blocks: int, num_bytes: int) -> dict[int, set[str]]:
    """Returns for each synchronizing instruction of a log the kinds of conflicts that it prevents, none if it
    separates no accesses. Errors: ValueError if there are conflicts with all of them in place.
    """
    if conflicts := Replay(num_blocks, num_bytes).run(events):
        raise ValueError(f"the log has conflicts of its own: {sorted(conflicts)}")
    instructions = sorted({event.instruction for event in events if event.kind in SYNCHRONIZING})
    return {
        instruction: {kind for kind, _ in Replay(num_blocks, num_bytes).run(events, without=instruction)}
        for instruction in instructions
    }
