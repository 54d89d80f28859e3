"""Do kernels hold at every size they serve? No GPU needed: `python -m bench.compile_sweep rope --arch sm_80,gfx942`

Compiles every config at every combination of sizes in configs/bench/sweep.toml, one line a kernel: registers, spills,
shared memory, and of the loop that does the work the tensor-core instructions and the bytes of a thread's widest load.
Of several such loops it is the worst that counts.

    --size d=72 kv=int8,int4    only these
    --csv FILE                  append the lines to this file

The last column says what may not be, and it exits with 1 if there is any: no compilation; spills; more shared memory
than there is; a product without tensor cores; on NVIDIA, keys and values loaded narrower than 16 bytes where rows of a
head begin at multiples of it and a tile has as much for each thread. AMD's compiler cannot load into memory that
threads share, and gives them the numbers as the tensor cores want them.
"""

import argparse
import csv
import os
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vila_triton.console import bar
from vila_triton.files.file_locks import locked
from vila_triton.limits import COUNT
from vila_triton.paths import config_dir
from vila_triton.registry import OPS
from vila_triton.registry.interpreter import holds_kernels

from ._tool import tool
from .compiled import Call, compile_call, elsewhere, prepare
from .compiler.gpus import CHECKED, TARGETS
from .compiler.inspect_text import aligned
from .compiler.kernel_stats import Dissection, dissect
from .measure.cases import combinations
from .measure.rows import WRITTEN

WIDEST = 16  # bytes
ABOUT = ("op", "impl", "config", "d", "dtype", "kv", "arch")
COLUMNS: tuple[str, ...] = (*ABOUT, "kernel", "registers", "spills", "shared", "tensor", "load", "wrong")


def could_load(sizes: Mapping[str, Any], found: Dissection) -> int:
    """Bytes that a load of keys can bring: rows of a head lie one after the other, a tile is dealt to all threads."""
    row = sizes["d"] * {"plain": 16, "int8": 8, "int4": 4}[sizes.get("kv", "plain")] // 8
    mine = row * found.anatomy.tile["BLOCK_N"] // found.anatomy.threads
    return min(WIDEST, row & -row, 1 << max(0, mine.bit_length() - 1))


def look(sizes: Mapping[str, Any], kernel: Any) -> dict[str, Any]:
    """The figures of one kernel, and what is wrong with them."""
    found = dissect(kernel)
    of, gpu = found.anatomy, kernel.metadata.target
    target = TARGETS[gpu.arch if gpu.backend == "hip" else f"sm_{gpu.arch}"]
    widths = {x.short: x.width for x in found.code}
    row = {name: getattr(of, name) for name in ("kernel", "registers", "spills", "shared")}
    row["tensor"] = min(sum(loop.tensor.values()) for loop in of.loops)
    row["load"] = min(max((widths[name] for name in loop.loads), default=0) for loop in of.loops)
    wrong = [f"spills {of.spills}"] if of.spills else []
    if of.shared > target.block_shared:
        wrong += [f"{of.shared - target.block_shared} bytes of shared memory too many"]
    if "tt.dot" in kernel.asm["ttir"]:
        if not row["tensor"]:
            wrong += ["no tensor cores"]
        if target.gpu.backend == "cuda" and row["load"] < (could := could_load(sizes, found)):
            wrong += [f"could load {could}"]
    return row | {"wrong": "; ".join(wrong)}


def rows_of(call: Call) -> list[dict[str, Any]]:
    """A row for each kernel of a call; one row if it does not compile, none if it is not supported."""
    head = {"op": call.op, "impl": call.impl, "config": call.config, "arch": call.target}
    head |= {name: call.sizes.get(name, "") for name in ("d", "dtype", "kv")}
    outcome = compile_call(partial(look, call.sizes), call)
    if outcome.error:
        return [head | {"wrong": outcome.error.splitlines()[0]}]
    return [head | row for row in outcome.kernels]


def calls_of(args: argparse.Namespace) -> Iterator[Call]:
    """Errors: ValueError for an op that the file does not name, or a size that no op has."""
    table = tomllib.loads((config_dir() / "bench" / "sweep.toml").read_text())
    if unknown := set(args.op) - table.keys():
        raise ValueError(f"configs/bench/sweep.toml has no {', '.join(unknown)}; it has {', '.join(table)}")
    only = {name: values.split(",") for name, _, values in (text.partition("=") for text in args.size)}
    known = {size for name in args.op or table for size in OPS[name].domain}
    if unknown := only.keys() - known:
        raise ValueError(
            f"--size {', '.join(sorted(unknown))}: expected NAME=VALUE,..., a name among {', '.join(sorted(known))}"
        )
    for name in args.op or table:
        for sizes in combinations(table[name], OPS[name]):
            if any(str(sizes[key]) not in values for key, values in only.items() if key in sizes):
                continue
            for impl in filter(holds_kernels, OPS[name].impls.values()):
                if args.impl and impl.name not in args.impl:
                    continue
                for number in range(len(impl.configs)):
                    yield from (Call(name, impl.name, number, arch, sizes) for arch in args.arch)


def run(args: argparse.Namespace) -> int:
    prepare(args.kernels, peers=False)
    if not (calls := list(calls_of(args))):
        raise ValueError("no implementation and sizes are left to compile; see --impl and --size")
    rows: list[dict[str, Any]] = []
    for i, found in enumerate(elsewhere(rows_of, calls, args.workers, args.kernels), 1):
        bar(f"{i} of {len(calls)} compiled")
        rows += found
        if args.csv:
            write(args.csv, found)
    bar("")
    print(*aligned([COLUMNS, *([row.get(name, "") for name in COLUMNS] for row in rows)]), sep="\n")
    wrong = sum(bool(row["wrong"]) for row in rows)
    print(f"{len(rows)} kernels, {wrong} of them wrong")
    return int(bool(wrong))


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    WRITTEN[file] = None
    with file.open("a", newline="") as out, locked(out):
        to = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if not out.seek(0, os.SEEK_END):
            to.writeheader()
        to.writerows(rows)
        out.flush()


@tool
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help="default: all that configs/bench/sweep.toml names")
    parser.add_argument("--impl", nargs="+", help="default: all of kernels/ that launch a Triton kernel")
    parser.add_argument("--arch", default=",".join(CHECKED), help="default: %(default)s")
    parser.add_argument("--size", nargs="+", default=[], metavar="NAME=VALUE,...", help="only these of the sizes")
    parser.add_argument("--kernels", metavar="FOLDER", help="take the implementations from here, not from kernels/")
    parser.add_argument("--workers", type=COUNT, default=2)
    parser.add_argument("--csv", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    args.arch = args.arch.split(",")
    if unknown := [name for name in args.arch if name not in TARGETS]:
        parser.error(f"--arch {', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            return run(args)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
