"""Does the emulator see a fault in a compiled kernel? `python -m bench.ptx_mutants int4_matmul`

Kernels that use shared memory are compiled once for each target, then run with faults planted in their PTX, one at a
time: a barrier, a wait or a proxy fence dropped, a bound off by one, other 4-bit codes, a weight in 16 bits. A fault is
found if a check of the emulator or the error budget says so. Whether a barrier or wait separates two accesses at all is
computed from what the correct run accessed (`bench.ptx_mutants.separators`); those that do not are run as well, and are
listed as harmless where no check reports them, else as disputed.

Exit code: 0 at least 95 % of the faults that ran were found, 1 fewer, 2 the command failed.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from vila_triton.registry import discover

from .._tool import tool
from ..measure import rows
from .cases import TARGETS, cases_for
from .run import CRASHED, DISPUTED, MISSED, Outcome, plant_all
from .table import report_lines, share_found

GOAL = 0.95
KIND = "ptx mutant"


def read_journal(journal: Path | None) -> list[Outcome]:
    """Returns the outcomes of a journal, none if there is no such file."""
    known = rows.read(journal, kind=KIND) if journal and journal.exists() else ()
    return [Outcome(**{name: row[name] for name in row if name != "kind"}) for row in known]


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="beginnings of names, as printed; default: all")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--rules", nargs="+", metavar="WORD", help="only faults whose rule has one of these words")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="keep outcomes there, and run no case it has")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the report there, in Markdown")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    discover()
    cases = [case for target in args.targets for case in cases_for(target)]
    names = [case.name for case in cases]
    if unknown := [x for x in args.cases if not any(name.startswith(x) for name in names)]:
        raise ValueError(f"no case begins with {unknown[0]}; there are {', '.join(names)}")
    outcomes = read_journal(args.journal)
    known = {x.case for x in outcomes}
    for case in cases:
        if case.name in known or (args.cases and not case.name.startswith(tuple(args.cases))):
            continue
        start, first = time.perf_counter(), len(outcomes)
        for outcome in plant_all(case, lambda edit: not args.rules or set(args.rules) & set(edit.rule.name.split())):
            outcomes.append(outcome)
            if outcome.verdict in (MISSED, CRASHED, DISPUTED):
                fault = f"{outcome.rule}: {outcome.source}, instruction {outcome.instruction}: {outcome.text}"
                print(f"{outcome.verdict.upper()}  {case.name} {fault} {outcome.detail}", flush=True)
        if args.journal:
            rows.write(args.journal, ({"kind": KIND, **asdict(x)} for x in outcomes[first:]))
        numbers = Counter(x.verdict for x in outcomes[first:])
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in numbers.items())
        print(f"{time.perf_counter() - start:6.1f} s  {case.name}: {verdicts}", flush=True)
    lines = list(report_lines(outcomes))
    print("", *lines, sep="\n")
    if args.table:
        args.table.write_text("\n".join(("# Faults planted in compiled kernels", "", *lines)) + "\n")
    return int(share_found(outcomes) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
