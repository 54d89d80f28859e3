"""What an emulation reports: its launches, the faults of each, and counters by instruction."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fault:
    """Something that a kernel did and no kernel may do.

    kind         the check that failed, in two or three words
    message      a sentence: what, where, how many threads
    kernel       the name of the kernel
    instruction  the PTX instruction
    source       "file:line" of the Python source that it comes from
    """

    kind: str
    message: str
    kernel: str
    instruction: str
    source: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}: {self.message}\n    {self.source}\n    {self.instruction}"


class KernelFault(AssertionError):
    """A kernel did what no kernel may do. faults: all of them, of one launch."""

    def __init__(self, faults: list[Fault]):
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults
        self.kind = faults[0].kind


@dataclass
class Launch:
    """One launch of a kernel, after it ran.

    counts   (instruction id, counter) -> number, counters as in `counters`
    entered  basic block -> warps that ran it
    """

    kernel: str
    grid: tuple[int, int, int]
    target: str
    program: Any
    shared_bytes: int
    seconds: float
    faults: list[Fault]
    counts: Counter
    entered: Counter


@dataclass
class Report:
    """What ran inside `emulating`."""

    target: str
    launches: list[Launch] = field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def faults(self) -> list[Fault]:
        return [fault for launch in self.launches for fault in launch.faults]
