"""Do the checks and tests see a small fault in a kernel? `python -m bench.mutants swiglu --count 20`

Mutants are made by rule from the syntax tree of a kernel file: a mask dropped, a bound shifted, operands swapped, and
so on. Each runs in a process of its own, first through `check` of every implementation that runs its code, then through
the tests that coverage maps to its line, until one fails. What neither finds has survived, and is printed: either a
test is missing or the change is none, which `bench/mutants/equivalent.toml` says with its reason.

OP is an op, for the files of its kernels and of what they import, or a file or folder of kernels/ or vila_triton/;
without one all of kernels/ is meant. Results go to a journal as they come; the same command goes on where it was.

    python -m bench.mutants --map tests/kernels tests/ops    which tests run which line: once, and after changes
    python -m bench.mutants --survivors                      run those again that survived

Exit code: 0 all were found or are equivalent, 1 some survived, 2 the command failed.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

from vila_triton.limits import COUNT, COUNT_OR_ZERO, POSITIVE

from .._tool import tool
from ..measure import rows
from .draw import draw, left_out
from .equivalent import equivalent_mutants, read_equivalent, verify_all
from .find_mutant import Outcome
from .line_map import MAP_FILE, LineMap, build_map
from .processes import prepare_to_fork
from .run import Limits, journal_row, read_journal, search_all
from .source import Mutant
from .table import report_lines

KERNELS = rows.ROOT / "kernels"
CHECK = "bench.correctness.find_failure"


def kernel_files(op: str) -> set[str]:
    """Returns the files of kernels/ that implement an op, and those that they import. Errors: ValueError."""
    texts = {path.stem: path.read_text() for path in KERNELS.glob("*.py")}
    stems = {stem for stem, text in texts.items() if re.search(rf"^@{re.escape(op)}\.impl\(", text, re.MULTILINE)}
    if not stems:
        raise ValueError(f"{op} is no file, and no kernel implements an op of that name")
    while more := {x for stem in stems for x in re.findall(r"^from \.(\w+) import", texts[stem], re.MULTILINE)} - stems:
        stems |= more
    return {f"kernels/{stem}.py" for stem in stems}


def source_files(targets: Sequence[str]) -> list[str]:
    """Returns the files that the arguments name, relative to the repository. Errors: ValueError."""
    files: set[str] = set()
    for target in targets or [str(KERNELS)]:
        path = Path(target)
        if path.exists():
            found = {path} if path.is_file() else set(path.rglob("*.py"))
            files |= {x.resolve().relative_to(rows.ROOT).as_posix() for x in found if x.name != "__init__.py"}
        else:
            files |= kernel_files(target)
    if outside := [file for file in files if file.split("/")[0] not in ("kernels", "vila_triton")]:
        raise ValueError(f"{outside[0]} lies neither in kernels/ nor in vila_triton/")
    return sorted(files)


def progress(mutant: Mutant, outcome: Outcome) -> str:
    """Returns a mutant and what became of it in one line."""
    found = f"{outcome.found_by or 'SURVIVED'}: {outcome.detail}"
    return f"{outcome.seconds:6.1f} s  {mutant.file}:{mutant.line}  {mutant.rule}: {mutant.diff()}  {found}"


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="OP")
    parser.add_argument("--count", type=COUNT, metavar="N", help="mutants to draw; default: all")
    parser.add_argument("--seed", type=COUNT_OR_ZERO, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--minutes", type=POSITIVE, help="at most; the rest is left for the next time")
    parser.add_argument("--journal", type=Path, default=MAP_FILE.with_name("journal.jsonl"), help="(%(default)s)")
    parser.add_argument("--processes", type=COUNT, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--check-seconds",
        type=COUNT_OR_ZERO,
        default=120,
        help="of the processor, for check of a mutant (%(default)s); 0: none",
    )
    parser.add_argument(
        "--test-seconds", type=COUNT_OR_ZERO, default=120, help="of the processor, for its tests (%(default)s); 0: none"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables there, in Markdown")
    parser.add_argument("--survivors", action="store_true", help="run those of the journal again that survived")
    parser.add_argument("--map", type=Path, nargs="+", metavar="TESTS", help="run tests and note the lines they run")
    parser.add_argument("--verify-equivalent", action="store_true", help="compare the bits of equivalent ones")
    args = parser.parse_args(argv)
    if not rows.IN_CHECKOUT:
        raise ValueError("faults are planted in a checkout of the repository, for its tests to find; this is none")
    start = time.monotonic()
    if args.map:
        prepare_to_fork()
        build_map(args.map, MAP_FILE, args.processes)
        return 0
    equivalent = read_equivalent()
    files = source_files(args.targets)
    drawn = draw(files, args.count, args.seed)
    if args.verify_equivalent:
        prepare_to_fork()
        for line in verify_all([x for x in equivalent_mutants(equivalent) if x.file in files], args.processes):
            print(line, flush=True)
        return 0
    known = read_journal(args.journal)
    for reason, number in left_out(files).most_common():
        print(f"left out     {number:4}  {reason}")
    again = {row["id"] for row in known.values() if not row["found_by"]} if args.survivors else set()
    mutants = [x for x in drawn if x.id not in equivalent and (x.id in again if args.survivors else x.id not in known)]
    if older := sum(known[x.id].get("commit") != rows.commit() for x in drawn if x.id in known):
        print(f"{older} results in {args.journal} are of other commits; remove it to search for all mutants again")
    print(f"{len(drawn)} mutants of {len(files)} files, {len(mutants)} to run", flush=True)
    if mutants:  # what is mutated must not be imported before a process is forked
        prepare_to_fork(*([] if any(x.file.startswith("vila_triton/") for x in mutants) else [CHECK]))
    end = start + 60 * args.minutes if args.minutes else inf
    limits = Limits(args.check_seconds, args.test_seconds, args.processes, end)
    for number, (mutant, outcome) in enumerate(search_all(mutants, LineMap(MAP_FILE), limits), 1):
        rows.write(args.journal, [journal_row(mutant, outcome)])
        print(f"{number:4}/{len(mutants)} {progress(mutant, outcome)}", flush=True)
    known = read_journal(args.journal)
    same = Outcome("", "equivalent", 0.0)
    table_rows = [known.get(x.id) or journal_row(x, same) for x in drawn if x.id in known or x.id in equivalent]
    lines = list(report_lines(table_rows, equivalent))
    print(*lines, sep="\n")
    if args.table:
        args.table.write_text("\n".join(lines) + "\n")
    return int(any(not row["found_by"] and row["id"] not in equivalent for row in table_rows))


if __name__ == "__main__":
    sys.exit(main())
