"""Which tests run a line: pytest under coverage, a row for each file of tests.

A kernel that Triton's interpreter runs is compiled anew from its syntax tree, with the numbers of its lines kept, so
coverage sees it as any other code. What only a subprocess of a test runs is not seen.
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from vila_triton.hashing import short_hash

from ..measure import rows
from .processes import Extend, Failed, run_processes

MAP_FILE = rows.ROOT / ".cache" / "mutants" / "lines.jsonl"
SOURCES = ("kernels", "vila_triton")
SECONDS = 1200.0  # for a file of tests


class Contexts:
    """A plugin of pytest that names each test to coverage, and keeps the seconds of those that pass."""

    def __init__(self, coverage: Any):
        self.coverage, self.seconds, self.failed = coverage, dict[str, float](), set[str]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        elif not report.passed:
            self.failed.add(report.nodeid)


def file_hash(file: str) -> str:
    """Returns a hash of a file, named relative to the repository."""
    return short_hash((rows.ROOT / file).read_bytes())


def format_lines(lines: Iterable[int]) -> str:
    """Returns sorted numbers as ranges: 1-3,7."""
    ranges: list[list[int]] = []
    for line in sorted(lines):
        if ranges and ranges[-1][1] == line - 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in ranges)


def parse_lines(text: str) -> Iterator[range]:
    """Yields the ranges that `format_lines` wrote."""
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        yield range(int(first), int(last or first) + 1)


def measure(test_file: str, extend: Extend) -> dict[str, Any]:
    """Runs a file of tests and returns its row: the seconds of each test that passes, and by source file the lines that
    each test runs.
    """
    coverage: Any = import_module("coverage")  # README's commands do not install it
    extend(SECONDS)
    include = [str(rows.ROOT / folder / "**" / "*.py") for folder in SOURCES]
    cover = coverage.Coverage(data_file=None, include=include, config_file=False)
    plugin = Contexts(cover)
    cover.start()
    with redirect_stdout(io.StringIO()):
        pytest.main([test_file, "-q", "-p", "no:cacheprovider"], plugins=[plugin])
    cover.stop()
    data, lines = cover.get_data(), dict[str, dict[str, str]]()
    for path in sorted(data.measured_files()):
        by_test: dict[str, list[int]] = {}
        for line, contexts in data.contexts_by_lineno(path).items():
            for context in contexts:
                by_test.setdefault(context, []).append(line)
        found = {test: format_lines(numbers) for test, numbers in by_test.items() if test in plugin.seconds}
        if found:
            lines[Path(path).relative_to(rows.ROOT).as_posix()] = found
    seconds = {test: round(time, 3) for test, time in plugin.seconds.items() if test not in plugin.failed}
    hashes = {file: file_hash(file) for file in (test_file, *lines)}
    return {"kind": "lines", "test_file": test_file, "hashes": hashes, "seconds": seconds, "lines": lines}


def test_files(paths: Iterable[Path]) -> list[str]:
    """Returns the files of tests at or below the paths, relative to the repository."""
    files = {x for path in paths for x in ([path] if path.is_file() else path.rglob("test_*.py"))}
    return sorted(file.resolve().relative_to(rows.ROOT).as_posix() for file in files)


def build_map(paths: Iterable[Path], file: Path, processes: int) -> None:
    """Runs the tests at the paths and appends their rows to a file; those that are there for the same text stay."""
    known = {row["test_file"] for row in read_rows(file) if is_current(row, row["test_file"])}
    missing = deque(test for test in test_files(paths) if test not in known)
    count = len(missing)
    for number, (test, row) in enumerate(run_processes(measure, missing, processes), 1):
        outcome = row if isinstance(row, Failed) else f"{len(row['seconds'])} tests"
        print(f"{number:4}/{count}  {test}: {outcome}", flush=True)
        if not isinstance(row, Failed):
            rows.write(file, [row])


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Returns the latest row of each file of tests that is still there."""
    found = {row["test_file"]: row for row in rows.read(file, kind="lines")} if file.exists() else {}
    return [row for test, row in found.items() if (rows.ROOT / test).exists()]


def is_current(row: dict[str, Any], file: str) -> bool:
    """Returns True if a file is as it was when the tests of a row ran."""
    return row["hashes"].get(file) == file_hash(file)


class LineMap:
    """The tests that run each line of a source file.

    Of a file of tests that has changed since, these are all of its tests, if it ran anything of the source file. If the
    source file has changed, or none runs just this line as a test (a constant is read as the file is imported), these
    are all tests that ran anything of it.
    """

    def __init__(self, file: Path):
        self.rows = read_rows(file)

    def tests(self, file: str, first: int, last: int) -> dict[str, float]:
        """Returns the tests that run one of the lines from `first` to `last` of a file, and their seconds: those of the
        folder of the same name first, and of these the fastest.
        """
        folder = Path(file).parent.name
        wanted = range(first, last + 1)
        found: dict[str, float] = {}
        anything: dict[str, float] = {}
        for row in self.rows:
            by_test, seconds = row["lines"].get(file, {}), row["seconds"]
            if by_test and not is_current(row, row["test_file"]):
                found[row["test_file"]] = sum(seconds.values())
                continue
            anything |= {test: seconds.get(test, 0.0) for test in by_test}
            changed = not is_current(row, file)
            hits = (t for t, text in by_test.items() if changed or any(overlap(r, wanted) for r in parse_lines(text)))
            found |= {test: seconds.get(test, 0.0) for test in hits}
        tests = (found or anything).items()
        return dict(sorted(tests, key=lambda pair: (f"/{folder}/" not in pair[0], pair[1], pair[0])))


def overlap(a: range, b: range) -> bool:
    """Returns True if two ranges of step 1 share a number."""
    return a.start < b.stop and b.start < a.stop
