"""Counters of the stand-in: kernel launches, kernels to compile, operators, and the lines where the host waits."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STANDIN_FOLDER = Path(__file__).resolve().parent


@dataclass
class Counts:
    """Launches by kernel; compiled kernels by kernel and specialization; waits by (operation, file:line), those apart
    during which the device has other work; operators by name; allocations of device memory by file:line.
    """

    launches: Counter[str] = field(default_factory=Counter)
    compiled: set[tuple[str, str]] = field(default_factory=set)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    overlapped_waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    allocations: Counter[str] = field(default_factory=Counter)
    captures: int = 0  # of graphs
    replays: int = 0
    operators: Counter[str] = field(default_factory=Counter)  # of torch, by name

    def write(self, file: Path) -> None:
        """Writes the totals and their parts to a file, as JSON."""
        rows = {
            "launches": dict(self.launches),
            "compiled": dict(Counter(kernel for kernel, _ in self.compiled)),
            "waits": {f"{line}: {operation}": n for (operation, line), n in self.waits.most_common()},
            "overlapped waits": {f"{line}: {what}": n for (what, line), n in self.overlapped_waits.most_common()},
            "graphs": {"captures": self.captures, "replays": self.replays},
            "operators": dict(self.operators),
        }
        file.write_text(json.dumps(rows, indent=1) + "\n")


counters = [Counts()]  # of the whole process, then of each `counting` under way


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts inside the `with`."""
    counts = Counts()
    counters.append(counts)
    try:
        yield counts
    finally:
        counters.remove(counts)


@cache
def name_in_repository(file: str) -> str | None:
    """Returns the name of a file of this repository, None for any other and for the stand-in's own."""
    path = Path(file)
    is_ours = path.is_relative_to(ROOT) and path.parent != STANDIN_FOLDER and "site-packages" not in path.parts
    return str(path.relative_to(ROOT)) if is_ours else None


def calling_line() -> str:
    """Returns file:line of the line of this repository that is running, the stand-in's own files left out."""
    frame = sys._getframe(1)
    while frame is not None:
        if name := name_in_repository(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def count_wait(operation: str, overlapped: bool = False) -> None:
    """Counts one wait of the host for the device, at the line that causes it.

    overlapped: the device has other work, queued behind what the host waits for.
    """
    line = calling_line()
    for counts in counters:
        (counts.overlapped_waits if overlapped else counts.waits)[operation, line] += 1


def count_allocation() -> None:
    """Counts one allocation of device memory, at the line that causes it."""
    line = calling_line()
    for counts in counters:
        counts.allocations[line] += 1


def count_capture() -> None:
    """Counts one graph that was captured."""
    for counts in counters:
        counts.captures += 1


def count_replay() -> None:
    """Counts one replay of a graph."""
    for counts in counters:
        counts.replays += 1


def count_launch(kernel: str, specialization: str) -> None:
    """Counts one launch. Launches of one kernel with different specializations are different kernels to compile."""
    for counts in counters:
        counts.launches[kernel] += 1
        counts.compiled.add((kernel, specialization))


def count_operator(name: str) -> None:
    """Counts one operator of torch."""
    for counts in counters:
        counts.operators[name] += 1
