"""Local memory: bytes of each thread alone, where compilers keep arrays and what does not fit into registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from .lockstep import Lockstep

Array = np.ndarray
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class LocalMemory:
    """`size` bytes of each thread of a machine, made when they are first written."""

    def __init__(self, machine: Lockstep, size: int):
        self.machine, self.size = machine, size
        self.bytes: Array | None = None
        self.written: Array | None = None

    def select(self, machine: Lockstep, keep: Array) -> LocalMemory:
        """The memory of some of the blocks."""
        new = LocalMemory(machine, self.size)
        if self.bytes is not None and self.written is not None:
            new.bytes, new.written = self.bytes[keep], self.written[keep]
        return new

    def places(self, i: int, address: Array, mask: Array | None, size: int) -> tuple[tuple[Array, Array, Array], Array]:
        """The index of the bytes that running threads touch [running, size], and which run [blocks, threads]."""
        machine = self.machine
        shape = machine.blocks, machine.threads
        if self.bytes is None:
            self.bytes = np.zeros((*shape, self.size), np.uint8)
            self.written = np.zeros((*shape, self.size), bool)
        active = np.ones((1, 1), bool) if machine.active is None else machine.active
        runs = np.broadcast_to(active if mask is None else active & mask, shape)
        address = np.broadcast_to(address, shape).astype(np.int64)
        for kind, bad in (("misaligned", address % size != 0), ("out of bounds", address + size > self.size)):
            if (bad & runs).any():
                machine.fault(i, kind, f"{size} bytes of local memory at a byte of {self.size}", bad & runs)
                runs = runs & ~bad
        block, thread = np.nonzero(runs)
        at = address[runs][:, None] + np.arange(size)
        return (block[:, None], thread[:, None], at), runs

    def load(self, i: int, address: Array, mask: Array | None, width: int, count: int, old: list | None) -> list[Array]:
        """`count` elements of `width` bytes of each thread."""
        places, runs = self.places(i, address, mask, width * count)
        assert self.bytes is not None and self.written is not None
        if not self.written[places].all():
            bad = np.zeros(runs.shape, bool)
            bad[runs] = ~self.written[places].all(1)
            self.machine.fault(i, "register unwritten", "reads local memory that the thread has not written", bad)
        found = np.ascontiguousarray(self.bytes[places]).view(WORD[width])
        values = []
        for n in range(count):
            value = np.zeros(runs.shape, WORD[width])
            if old is not None:
                value[:] = old[n]
            value[runs] = found[:, n]
            values.append(value)
        return values

    def store(self, i: int, address: Array, mask: Array | None, width: int, values: list[Array]) -> None:
        """Write elements of `width` bytes."""
        places, runs = self.places(i, address, mask, width * len(values))
        assert self.bytes is not None and self.written is not None
        rows = np.stack([np.broadcast_to(value, runs.shape)[runs] for value in values], 1)
        self.bytes[places] = np.ascontiguousarray(rows).view(np.uint8)
        self.written[places] = True


class GenericMemory:
    """Global and local memory by one kind of address: the first bytes are local memory, and no tensor lies there."""

    def __init__(self, global_memory: Any, local_memory: LocalMemory):
        self.global_memory, self.local_memory = global_memory, local_memory

    def parts(self, address: Array, mask: Array | None) -> list[tuple[Any, Array | None]]:
        """The memories that are touched, and by which threads."""
        if not self.local_memory.size:
            return [(self.global_memory, mask)]
        local = address < np.uint64(self.local_memory.size)
        parts = [(self.local_memory, local), (self.global_memory, ~local)]
        return [(memory, part if mask is None else part & mask) for memory, part in parts if part.any()]

    def load(self, i: int, address: Array, mask: Array | None, width: int, count: int, old: list | None) -> list[Array]:
        """`count` elements of `width` bytes of each thread."""
        values = old or [np.zeros((1, 1), WORD[width])] * count
        for memory, part in self.parts(address, mask):
            values = memory.load(i, address, part, width, count, values)
        return values

    def store(self, i: int, address: Array, mask: Array | None, width: int, values: list[Array]) -> None:
        """Write elements of `width` bytes."""
        for memory, part in self.parts(address, mask):
            memory.store(i, address, part, width, values)
