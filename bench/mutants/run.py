"""Searches for mutants, two at a time, with a journal: a row for each mutant as soon as it is known."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from ..measure import rows
from .find_mutant import Job, Outcome, find_mutant
from .line_map import LineMap
from .processes import Failed, run_processes
from .source import Mutant

FORM = ("id", "file", "rule", "line", "before", "after", "found_by", "detail")


@dataclass(frozen=True)
class Limits:
    """Seconds for `check` of a mutant and for its tests; processes; and the end, of `time.monotonic`."""

    check_seconds: float
    test_seconds: float
    processes: int
    end: float = inf


def read_journal(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the latest row of each mutant, by its id. Errors: ValueError for a row that is none of a mutant."""
    found = {}
    for row in rows.read(file, kind="mutant") if file.exists() else ():
        if missing := [name for name in FORM if name not in row]:
            raise ValueError(f"{file}: a row of kind mutant has no {missing[0]}")
        found[row["id"]] = row
    return found


def outcome_of(result: Outcome | Failed) -> Outcome:
    """Returns the outcome that a process that ended otherwise stands for: a mutant that hangs or crashes is found; an
    exception of the search itself is none, and looked at as a survivor is.
    """
    if isinstance(result, Outcome):
        return result
    if result == "hung" or result.startswith("crashed"):
        return Outcome(result.partition(":")[0], str(result), 0.0)
    return Outcome("", f"the search failed: {result.strip().splitlines()[-1]}", 0.0)


def search_all(mutants: Sequence[Mutant], lines: LineMap, limits: Limits) -> Iterator[tuple[Mutant, Outcome]]:
    """Yields each mutant with its outcome, until the end of time.

    A test that fails has found the mutant only if it passes with the file as it is in the mutant's place; otherwise
    the mutant is searched for again without this test.
    """
    unfit: set[tuple[str, str]] = set()  # (file, test)
    fit: set[tuple[str, str]] = set()

    def job_of(mutant: Mutant) -> Job:
        tests = lines.tests(mutant.file, mutant.line, mutant.last_line) if limits.test_seconds else {}
        left_out = [test for file, test in unfit if file == mutant.file]
        return Job(mutant, limits.check_seconds, limits.test_seconds, tests, left_out)

    jobs = deque(map(job_of, mutants))
    for job, result in run_processes(find_mutant, jobs, limits.processes):
        outcome = outcome_of(result)
        key = (job.mutant.file, outcome.detail)
        if outcome.found_by == "tests" and key not in fit:
            control = replace(job, check_seconds=0.0, tests={outcome.detail: 0.0}, unfit=(), control=True)
            ((_, answer),) = run_processes(find_mutant, deque([control]), 1)
            (unfit if outcome_of(answer).found_by else fit).add(key)
            if key in unfit:
                jobs.append(replace(job_of(job.mutant), check_seconds=0.0))
                continue
        yield job.mutant, outcome
        if time.monotonic() > limits.end:
            return


def journal_row(mutant: Mutant, outcome: Outcome) -> dict[str, Any]:
    """Returns the row of a mutant."""
    return {"kind": "mutant", **asdict(mutant), **asdict(outcome), "commit": rows.commit()}
