"""What the stand-in counts: launches, kernels to compile, and where the host waits for the device."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STANDIN_FOLDER = Path(__file__).resolve().parent


@dataclass
class Counts:
    """Launches by kernel, kernels a GPU would compile by kernel and specialisation, waits by (what, file:line)."""

    launches: Counter[str] = field(default_factory=Counter)
    compiled: set[tuple[str, str]] = field(default_factory=set)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)  # of torch, by name

    def write(self, file: Path) -> None:
        """As JSON: totals, and what they are made of."""
        rows = {
            "launches": dict(self.launches),
            "compiled": dict(Counter(kernel for kernel, _ in self.compiled)),
            "waits": {f"{line}: {operation}": n for (operation, line), n in self.waits.most_common()},
            "operators": dict(self.operators),
        }
        file.write_text(json.dumps(rows, indent=1) + "\n")


counters = [Counts()]  # of the whole process, then of each `counting` under way


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens inside the `with`."""
    counts = Counts()
    counters.append(counts)
    try:
        yield counts
    finally:
        counters.remove(counts)


def calling_line() -> str:
    """The line of this repository that is running, leaving out the stand-in itself."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file.parent != STANDIN_FOLDER and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def count_wait(operation: str) -> None:
    line = calling_line()
    for counts in counters:
        counts.waits[operation, line] += 1


def count_launch(kernel: str, specialization: str) -> None:
    for counts in counters:
        counts.launches[kernel] += 1
        counts.compiled.add((kernel, specialization))


def count_operator(name: str) -> None:
    for counts in counters:
        counts.operators[name] += 1
