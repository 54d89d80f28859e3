"""The search for one mutant, in a process of its own: `check` first, then the tests that run its line."""

import ast
import io
import re
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from ..measure.rows import ROOT
from .module_text import module_name, replace_module_text
from .processes import Extend
from .source import Mutant

CHECK_EXAMPLES = 100  # as `bench.check` draws them
ROUNDS = (3.0, 10.0, 30.0)  # seconds for `check` of each config, with other examples in each round
HANG_SECONDS = 60.0  # what takes so much longer than it should hangs


@dataclass(frozen=True)
class Job:
    """A mutant, the seconds for `check` and for the tests, and the tests in order, each with the seconds it takes;
    `unfit` are tests to leave out.

    control: leave the mutant out, and only put the file where a mutant would be, with a comment more: a test that fails
    then as well has not found the mutant.
    """

    mutant: Mutant
    check_seconds: float  # of the processor, so that a machine that does other work finds as much; 0: without `check`
    test_seconds: float
    tests: Mapping[str, float]
    unfit: Collection[str] = ()
    control: bool = False


@dataclass(frozen=True)
class Outcome:
    """found_by is "import", "check", "tests", or "" for a mutant that survived; detail is the call or the test."""

    found_by: str
    detail: str
    seconds: float
    checked: int = 0  # configs
    tested: int = 0  # tests


def find_mutant(job: Job, extend: Extend) -> Outcome:
    """Returns what finds the mutant of a job. Imports of this process see the mutant from then on."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        text = (ROOT / job.mutant.file).read_text()
        changed = f"{text}\n# a comment\n" if job.control else job.mutant.apply(text)
        replace_module_text(job.mutant.file, changed, Path(folder))
        warnings.simplefilter("ignore")  # a kernel that reads beyond an argument computes with garbage
        found_by, detail, checked, tested = search(job, extend)
    return Outcome(found_by, detail, round(time.process_time() - start, 1), checked, tested)


def search(job: Job, extend: Extend) -> tuple[str, str, int, int]:
    """Returns the fields of the outcome, without its time."""
    checked = 0
    if job.mutant.file.startswith("kernels/") and job.check_seconds:
        if problem := import_problem():
            return "import", problem, 0, 0
        for fault in check_faults(job, extend):
            checked += 1
            if fault:
                return "check", fault, checked, 0
    if not job.tests:
        return "", "no test runs the line", checked, 0
    failed, tested = first_failing_test(job, extend)
    return ("tests", failed, checked, tested) if failed else ("", "", checked, tested)


def import_problem() -> str:
    """Imports all kernels; returns the problem that one had, "" if there is none."""
    from vila_triton.registry import discover, discovery

    with redirect_stderr(io.StringIO()):
        discover()
    return "; ".join(discovery.problems())


def check_faults(job: Job, extend: Extend) -> Iterator[str]:
    """Yields the fault of each config of each implementation that runs code of the file, "" for none: first configs
    first, in rounds of more and more seconds until those of the job are over.
    """
    from vila_triton.registry import OPS

    from ..correctness import find_failure as search_module

    search_module.SHRINK_SECONDS = 0.0
    clock = patch.object(search_module, "time", SimpleNamespace(monotonic=time.process_time))
    impls = impls_of(job.mutant.file)
    numbers = range(max((len(impl.configs) for impl in impls), default=0))
    pairs = [(impl, number) for number in numbers for impl in impls if number < len(impl.configs)]
    end = time.process_time() + job.check_seconds
    for seed, share in enumerate(ROUNDS):
        for impl, number in pairs:
            if time.process_time() > end:
                return
            extend(2 * share + HANG_SECONDS)
            with clock:
                config = impl.configs[number]
                found = search_module.find_failure(OPS[impl.op], impl, config, CHECK_EXAMPLES, share, seed).simplest
            yield f"{impl.op} {impl.name} {number}: {found.kind}" if found else ""


def impls_of(file: str) -> list[Any]:
    """Returns the implementations, other than references, that run code of a file of kernels/."""
    from vila_triton.registry import OPS, REFERENCE, discover

    discover()
    dependents = modules_that_import(module_name(file))
    impls = [impl for op in OPS.values() for impl in op.impls.values() if impl.name != REFERENCE]
    return [impl for impl in impls if impl.fn.__module__ in dependents]


def modules_that_import(name: str) -> set[str]:
    """Returns the modules of kernels/ that import a module, at any remove, and itself."""
    imported = {
        module_name(f"kernels/{file.name}"): {
            f"vila_triton.kernels.{node.module}"
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1
        }
        for file in (ROOT / "kernels").glob("*.py")
    }
    dependents = {name}
    while more := {x for x, names in imported.items() if names & dependents} - dependents:
        dependents |= more
    return dependents


class Deadline:
    """A plugin of pytest that notes the first failure, and ends the run when the seconds of the job are over."""

    def __init__(self, job: Job, extend: Extend):
        self.end, self.extend = time.process_time() + job.test_seconds, extend
        self.seconds = {str(ROOT / test): seconds for test, seconds in job.tests.items()}
        self.failed, self.tested = "", 0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if time.process_time() > self.end:
            pytest.exit("out of time")
        self.extend(HANG_SECONDS + 10 * self.seconds.get(str(ROOT / nodeid), 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tested += report.when == "call"
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:  # as the file is imported; that of the whole session comes after it
            self.failed = self.failed or report.nodeid


def first_failing_test(job: Job, extend: Extend) -> tuple[str, int]:
    """Returns the first test that fails, "" if none does in the seconds of the job, and the number that ran.

    Tests that are no longer there are left out. Errors: RuntimeError with what pytest says if it runs none.
    """
    plugin = Deadline(job, extend)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "--rootdir", str(ROOT)]
    options += [f"--deselect={test}" for test in job.unfit]
    if job.control and not any("::" in test for test in job.tests):
        options.append("--collect-only")
    tests = list(plugin.seconds)
    while tests:
        with redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
            code = pytest.main([*options, *tests], [plugin])
        if plugin.failed or code != pytest.ExitCode.USAGE_ERROR:
            break
        missing = set(re.findall(r"^ERROR: (?:not found:|found no collectors for) (.+)$", printed.getvalue(), re.M))
        if not missing & set(tests):
            raise RuntimeError(printed.getvalue())
        tests = [test for test in tests if test not in missing]
    return plugin.failed, plugin.tested
