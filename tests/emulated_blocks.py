"""Blocks in lockstep without a program: instructions are what a test calls, one for each text of PTX that it names."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bench.emulator.memory.global_memory import GlobalMemory, Regions
from bench.emulator.memory.regions import Region
from bench.emulator.memory.shared_memory import SharedMemory
from bench.emulator.program.memory_facts import memory_facts


@dataclass
class Instruction:
    text: str

    @property
    def modifiers(self) -> list[str]:
        return self.text.split(maxsplit=1)[0].split(".")[1:]


class Program:
    def __init__(self, texts: Sequence[str]):
        self.instructions = dict(enumerate(map(Instruction, texts)))
        self.memory = memory_facts(texts)
        self.remembered: dict[str, dict] = {}


class Blocks:
    """Blocks of some threads, with shared memory of `shared` bytes.

    texts      of the instructions, by which i counts in calls
    regions    what global memory there is; one object for blocks of one launch
    written    the arrays among them that a parameter names which stores can reach
    """

    def __init__(
        self,
        texts: Sequence[str],
        blocks: int = 1,
        threads: int = 64,
        shared: int = 1024,
        regions: Regions | None = None,
        first: int = 0,
        params: dict[str, np.ndarray] | None = None,
    ):
        self.blocks, self.threads, self.warps = blocks, threads, threads // 32
        self.block_ids = np.arange(first, first + blocks)
        self.active: np.ndarray | None = None
        self.checks: bool = True
        self.counters: bool = True
        self.counts = Counter()
        self.program: Any = Program(texts)
        self.params = params or {}
        self.faults: list[tuple[int, str, str]] = []
        self.global_memory = GlobalMemory(self, regions or Regions([]))
        self.shared_memory = SharedMemory(self, shared)

    def fault(self, i: int, kind: str, message: str, bad: np.ndarray | None = None) -> None:
        if bad is not None:
            assert np.broadcast_to(bad, (self.blocks, self.threads)).any()
        self.faults.append((i, kind, message))

    def kinds(self) -> list[str]:
        """The kinds of the faults so far, each once."""
        return sorted({kind for _, kind, _ in self.faults})

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """`load_shared`, `store_global` …: calls of a memory."""
        verb, _, space = name.rpartition("_")
        if space not in ("shared", "global") or not verb:
            raise AttributeError(name)
        return partial(getattr(self.__dict__[f"{space}_memory"], verb))


def addresses(values: ArrayLike) -> np.ndarray:
    """Addresses of shared memory, one row for all blocks."""
    return np.atleast_2d(np.asarray(values, np.uint32))


def region(array: np.ndarray, name: str = "x", valid: np.ndarray | None = None) -> Region:
    """The memory of a numpy array."""
    return Region(name, array.ctypes.data, array.nbytes, valid)
