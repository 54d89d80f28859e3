"""Check every config of every Triton kernel as compiled, without a GPU: `python -m bench.compiled_check`

Each config, compiled for each target, runs in `bench.emulator` at examples of every dtype in both memory layouts (see
`correctness.compiled_plan`), is compared with float64 within the error budget, and watched for races, stray accesses,
missing waits and the like. More calls of the same compiled code follow until every basic block was entered; those that
none enters are listed. Results are journaled as they are known: the same command goes on where it stopped, and does
again what a changed kernel, op or config makes stale. `--table` writes them as a document. Exit code: 0 nothing is
wrong, 1 something is wrong, 2 the command failed.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_triton.limits import COUNT
from vila_triton.registry import OPS, describe_available, discover
from vila_triton.registry.interpreter import uses_triton_kernels

from ._tool import kernels_option, tool
from .compiler.cross_compile import run_in_subprocesses
from .correctness.compiled_cell import Cell, check_cell
from .correctness.compiled_table import table
from .emulator.compile import EMULATED_TARGETS
from .measure import rows

FOLDER = rows.CACHE / "compiled_check"
DEFAULT_TARGETS = ("sm_80", "sm_90")


def all_cells(targets: Sequence[str]) -> list[Cell]:
    """A cell for each config of each Triton implementation and each target that it suits; first configs first."""
    discover()
    impls = [impl for op in OPS.values() for impl in op.impls.values() if uses_triton_kernels(impl)]
    numbered = [(impl, i) for impl in impls for i in range(len(impl.configs))]
    cells = [Cell(x.op, x.name, i, target) for x, i in numbered for target in targets if x.suits(i, target)]
    return sorted(cells, key=lambda cell: cell.number)


def read_journal(file: Path) -> dict[Cell, dict[str, Any]]:
    """The latest row of each cell."""
    found = rows.read(file, kind="compiled_check") if file.exists() else ()
    return {Cell(row["op"], row["impl"], row["number"], row["target"]): row for row in found}


def outcome(cell: Cell, row: Mapping[str, Any]) -> list[str]:
    """The lines that are printed about a cell."""
    blocks = sum(kernel["blocks"] for kernel in row["kernels"])
    missing = Counter(source for kernel in row["kernels"] for source in kernel["missing"])
    state = "WRONG" if row["wrong"] else "right" if row["examples"] else "unsupported"
    count = f"{row['examples']} examples, {len(row['kernels'])} kernels, {blocks} blocks"
    lines = [f"{state:12}{row['cpu_seconds']:6.1f} s  {cell}  {count}, {sum(missing.values())} never entered"]
    lines += [f"{'':12}{x['kind']}: {x['text'].splitlines()[0]}" for x in row["wrong"]]
    lines += [f"{'':12}  {x['call']}: python -m bench.check --replay {x['bundle']}" for x in row["wrong"]]
    return lines + [f"{'':12}{text}" for text in row["unsupported"] if not row["examples"]]


def select(cells: Sequence[Cell], words: Sequence[str]) -> list[Cell]:
    """The cells whose op, or op-implementation, is named. Errors: ValueError naming the choices."""
    names = {x for cell in cells for x in (cell.op, f"{cell.op}-{cell.impl}")}
    if unknown := set(words) - names:
        raise ValueError(f"no op {', '.join(sorted(unknown))}; there are: {describe_available(names)}")
    return [x for x in cells if not words or {x.op, f"{x.op}-{x.impl}"} & set(words)]


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these, or OP-IMPL; default: all")
    parser.add_argument(
        "--targets", nargs="+", choices=EMULATED_TARGETS, default=DEFAULT_TARGETS, help="default: sm_80 and sm_90"
    )
    parser.add_argument("--processes", type=COUNT, default=os.cpu_count(), help="at a time (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="do what was wrong again")
    parser.add_argument("--fresh", action="store_true", help="do all again, as after a change of the emulator")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write what is known by then as Markdown")
    args = parser.parse_args(argv)
    journal = FOLDER / "journal.jsonl"
    if args.fresh:
        journal.unlink(missing_ok=True)
    cells, start = select(all_cells(args.targets), args.ops), time.monotonic()
    known = read_journal(journal)
    kept = {x: known[x] for x in cells if x in known and known[x]["key"] == x.key()}
    pending = [x for x in cells if x not in kept or (args.again and kept[x]["wrong"])]
    print(f"{len(cells)} cells, {len(cells) - len(pending)} of them known; {args.processes} at a time", flush=True)
    results = run_in_subprocesses(check_cell, [(x, journal, FOLDER) for x in pending], args.processes)
    for i, (cell, row) in enumerate(zip(pending, results), 1):
        kept[cell] = row
        first, *others = outcome(cell, row)
        print(f"{i:3}/{len(pending)}  {time.monotonic() - start:5.0f} s  {first}", *others, sep="\n", flush=True)
    wrong = [str(cell) for cell, row in kept.items() if row["wrong"]]
    print(f"{len(kept)} cells, {len(wrong)} wrong; {sum(row['cpu_seconds'] for row in kept.values()):.0f} s of a CPU")
    if args.table:
        args.table.write_text(table(kept))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
