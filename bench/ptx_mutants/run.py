"""Plants faults in the kernels of a case, one after the other, and says what became of each."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vila_triton.registry import OPS

from ..correctness.error_budget import Example, example_args
from ..correctness.guarded_memory import MismatchError
from ..emulator import emulating
from ..emulator.program.ptx import Kernel
from ..emulator.report import Report
from .access_log import KernelLog, logged_accesses
from .cases import Case
from .edits import Edit, OtherKernelError, find_edits
from .products import find_product_waits
from .separators import find_separators

FOUND, MISSED, CRASHED, HARMLESS, NOT_RUN = "found", "missed", "crashed", "harmless", "not run"
LOADS_MORE, DISPUTED = "loads more", "disputed"


@dataclass(frozen=True)
class Outcome:
    """The fate of a planted fault: in which kernel, by which rule, at which instruction.

    verdict  FOUND       a check of the emulator, or the error budget
             MISSED      ran, is a fault, and neither of them saw it
             CRASHED     ended in another error, which is none to rely on
             DISPUTED    found, though it separates no accesses of this call
             LOADS_MORE  a bound that lets more elements be loaded, all of which exist, and leaves every store as it was
             HARMLESS    no fault: it separates no accesses of this call, or changes nobody's access
             NOT_RUN     the call does not come by
    detail   the kinds of faults that were found, or the reason
    """

    case: str
    kernel: str
    rule: str
    instruction: int
    text: str
    source: str
    verdict: str
    detail: str


@dataclass
class Subject:
    """A case whose kernels are compiled once and run as often as there are faults to plant.

    texts      the PTX of each kernel, by name
    report     of the run without a fault
    logs       what a run without a fault accessed, for each of the examples, by kernel
    """

    case: Case
    texts: dict[str, str] = field(default_factory=dict)
    logs: list[dict[str, KernelLog]] = field(default_factory=list)

    def __post_init__(self) -> None:
        op = OPS[self.case.op]
        self.impl = op.impls[self.case.impl]
        all_sizes = (self.case.sizes, *self.case.more_sizes)
        self.examples = [Example(op, example_args(op, 0, **sizes), 1, sizes) for sizes in all_sizes]
        self.report = self.run_unharmed(self.examples[0], self.note_text)
        for example in self.examples[1:]:
            self.run_unharmed(example, lambda text: text)

    @cached_property
    def separators(self) -> dict[str, dict[int, set[str]]]:
        """The instructions that separate accesses of the first example, by kernel: id -> what they prevent."""
        found = {}
        for launch in self.report.launches:
            log = self.logs[0].get(launch.kernel, KernelLog())
            found[launch.kernel] = find_separators(log.events, log.num_blocks, log.num_bytes) if log.events else {}
            for wait in find_product_waits(launch.program.kernel, [b for b, n in launch.entered.items() if n]):
                found[launch.kernel].setdefault(wait, set()).add("use of what wgmma may still be writing")
        return found

    def run_unharmed(self, example: Example, edit: Callable[[str], str]) -> Report:
        with logged_accesses() as logs:
            report, error = self.run(example, edit)
        self.logs.append(dict(logs))
        if error or report.faults:
            raise ValueError(f"{self.case.name} is wrong as it is: {error or report.faults[0]}")
        return report

    def note_text(self, text: str) -> str:
        found = re.search(r"\.entry\s+([\w$]+)", text)
        assert found
        self.texts[found[1]] = text
        return text

    def run(self, example: Example, edit: Callable[[str], str]) -> tuple[Report, Exception | None]:
        """Makes the call with edited kernels; returns the report, and the error that the call or its result gave."""
        error = None
        with emulating(self.case.target, counters=False, raise_faults=False, edit=edit) as report:
            try:
                example.check(self.impl, self.impl.configs[self.case.config], "aligned")
            except Exception as wrong:
                error = wrong
        return report, error

    def edits(self) -> Iterator[tuple[Edit, bool]]:
        """Yields the faults to plant, each with whether its instruction ran."""
        for launch in self.report.launches:
            kernel: Kernel = launch.program.kernel
            ran = {x.id for b in kernel.blocks if launch.entered[b.index] for x in b.instructions}
            for edit in find_edits(kernel, self.texts[launch.kernel]):
                yield edit, edit.instruction.id in ran

    def plant(self, edit: Edit, ran: bool) -> Outcome:
        """Runs the call with a fault, if it comes by."""
        if not ran:
            return self.outcome(edit, NOT_RUN, "its basic block is not entered")
        reasons = self.separators[edit.kernel].get(edit.instruction.id, set()) if edit.rule.orders else set[str]()
        same_masks = same_stores = True
        for example, logs_before in zip(self.examples if edit.rule.bound else self.examples[:1], self.logs):
            with logged_accesses() as logs:
                kinds, crash = self.find(edit, example)
            if crash:
                return self.outcome(edit, CRASHED, crash)
            if kinds:
                within_a_block = kinds != ["blocks race"]  # `separators` knows no others
                verdict = DISPUTED if edit.rule.orders and not reasons and within_a_block else FOUND
                return self.outcome(edit, verdict, ", ".join(kinds))
            pairs = [(log, logs[kernel]) for kernel, log in logs_before.items() if kernel in logs]
            same_masks &= all(a.masks.digest() == b.masks.digest() for a, b in pairs)
            same_stores &= all(a.stores.digest() == b.stores.digest() and not b.strays for a, b in pairs)
        if edit.rule.orders and not reasons:
            return self.outcome(edit, HARMLESS, "separates no accesses of two threads")
        if edit.rule.bound and same_masks:
            return self.outcome(edit, HARMLESS, "changes nobody's access")
        if edit.rule.bound and same_stores:
            return self.outcome(edit, LOADS_MORE, "of what exists, and stores the same")
        return self.outcome(edit, MISSED, "; ".join(sorted(reasons)))

    def find(self, edit: Edit, example: Example) -> tuple[list[str], str]:
        """Returns the kinds of faults that a run with an edit has, and the error that ended it otherwise."""
        report, error = self.run(example, edit.apply)
        kinds = sorted({fault.kind for fault in report.faults})
        if isinstance(error, MismatchError):
            kinds.append(error.kind)
        elif error and not isinstance(error, OtherKernelError):
            return kinds, f"{type(error).__name__}: {error}"
        return kinds, ""

    def outcome(self, edit: Edit, verdict: str, detail: str) -> Outcome:
        x = edit.instruction
        source = x.source.rpartition("/")[2]  # without the folders of the file
        return Outcome(self.case.name, edit.kernel, edit.rule.name, x.id, x.text, source, verdict, detail)


def plant_all(case: Case, select: Callable[[Edit], Any] = lambda edit: True) -> Iterator[Outcome]:
    """Yields the outcome of each selected fault of a case."""
    subject = Subject(case)
    for edit, ran in subject.edits():
        if select(edit):
            yield subject.plant(edit, ran)
