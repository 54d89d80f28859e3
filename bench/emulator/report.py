"""The report of an emulation: its launches, the faults of each, and counters by instruction."""

import linecache
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

TRITON = Path(triton.__file__).parent


@dataclass(frozen=True)
class Fault:
    """Something that a kernel did and no kernel may do.

    kind         the check that failed, in two or three words
    message      a sentence: what, where, how many threads
    kernel       the name of the kernel
    instruction  the PTX instruction
    source       "file:line" of the Python source that it comes from; of what Triton's library does, of its call
    """

    kind: str
    message: str
    kernel: str
    instruction: str
    source: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.kind}: {self.message}",
                f"    in {self.kernel}, {self.source}{source_text(self.source)}",
                f"    PTX: {self.instruction}",
            )
        )


def own_line(*lines: str) -> str:
    """Of a "file:line" and its callers, innermost first: the first that is not Triton's own, if there is one."""
    return next((line for line in lines if not is_of_triton(line)), lines[0])


def is_of_triton(line: str) -> bool:
    """True if a "file:line" is of Triton's library, in this environment or another: Triton's cache keeps the files'
    places in the environment that compiled first.
    """
    file = Path(line.rpartition(":")[0])
    return any(part.name == "triton" and (TRITON / file.relative_to(part)).exists() for part in file.parents)


def source_text(source: str) -> str:
    """The line of Python at "file:line", after a colon; nothing if it cannot be read."""
    file, _, line = source.rpartition(":")
    text = linecache.getline(file, int(line)).strip() if line.isdigit() else ""
    return text and f":  {text}"


class KernelFault(AssertionError):
    """A kernel did what no kernel may do. faults: all of them, of one launch; kind: that of the first."""

    def __init__(self, faults: list[Fault]):
        number = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join((f"{faults[0].kernel} has {number}", *map(str, faults))))
        self.faults = faults
        self.kind = faults[0].kind


@dataclass
class Launch:
    """One launch of a kernel, after it ran.

    kernel        its name
    grid          blocks along the three axes
    target        the GPU it was compiled for, as "sm_80"
    program       the compiled kernel as the emulator runs it
    shared_bytes  of shared memory a block has
    seconds       that it ran, without compiling
    faults        what it did and no kernel may do
    counts        (instruction id, counter) -> number, counters as in `counters`
    entered       basic block -> warps that ran it
    """

    kernel: str
    grid: tuple[int, int, int]
    target: str
    program: Any = field(repr=False)
    shared_bytes: int
    seconds: float
    faults: list[Fault]
    counts: Counter = field(repr=False)
    entered: Counter = field(repr=False)

    def total(self, counter: str) -> int:
        """A counter summed over all instructions, as "sectors" or "wavefronts"; 0 if nothing counted it."""
        return sum(number for (_, name), number in self.counts.items() if name == counter)


@dataclass
class Report:
    """The launches inside `emulating`, in order."""

    target: str
    launches: list[Launch] = field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def faults(self) -> list[Fault]:
        return [fault for launch in self.launches for fault in launch.faults]

    def __str__(self) -> str:
        """A line for each launch, then its faults."""
        lines = []
        for launch in self.launches:
            blocks = " x ".join(map(str, launch.grid))
            lines.append(f"{launch.kernel}: {blocks} blocks on {self.target}, {launch.seconds:.2f} s")
            lines += map(str, launch.faults)
        return "\n".join(lines)
