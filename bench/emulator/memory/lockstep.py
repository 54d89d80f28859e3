"""The blocks that run in lockstep, as the memories of a machine see them."""

from collections import Counter
from typing import Any, Protocol

import numpy as np


class Lockstep(Protocol):
    """A machine: some blocks of a grid.

    blocks, threads, warps   how many blocks, threads and warps of each
    block_ids                the number of each block in the grid
    active                   bool [blocks, threads]; None: every thread
    checks, counters         if faults are looked for, and accesses counted
    counts                   (instruction id, counter) -> number
    program                  .instructions: id -> instruction, with its modifiers; .memory: its MemoryFacts;
                             .remembered: accesses to each memory that were checked before
    params                   name of a parameter -> its bits
    """

    blocks: int
    threads: int
    warps: int
    block_ids: np.ndarray
    active: np.ndarray | None
    checks: bool
    counters: bool
    counts: Counter
    program: Any
    params: Any
    global_memory: Any

    def fault(self, i: int, kind: str, message: str, bad: np.ndarray | None = None) -> None:
        """Note a fault of an instruction; `bad`: the threads that did it."""
        ...
