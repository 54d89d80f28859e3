"""Compiles every config at every size it serves, without a GPU: `python -m bench.compile_sweep decode_attention`

The sizes are all combinations of those in configs/bench/compile_sweep.toml. Each kernel is one line: registers, spills,
shared memory, and of its main loop the tensor-core instructions and the bytes of a thread's widest load. Of several
main loops the worst counts.

    --arch sm_80,gfx942         only these architectures
    --size d=72 kv=int8,int4    only these sizes
    --csv FILE                  append the lines to this file

The last column says what no kernel may do, and the exit code is 1 if there is any: fail to compile; spill; want more
shared memory than there is; multiply without tensor cores; on NVIDIA, load keys and values narrower than 16 bytes where
the rows of a head begin at multiples of it and a tile has as much for each thread. (AMD's compiler cannot load into
shared memory, and gives threads the numbers as the tensor cores want them.)
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

from vila_triton.console import print_progress
from vila_triton.files.file_locks import exclusive_lock
from vila_triton.limits import COUNT
from vila_triton.paths import config_dir
from vila_triton.registry import OPS
from vila_triton.registry.interpreter import uses_triton_kernels

from ._tool import kernels_option, tool
from .compiler.cross_compile import CompileRequest, compile_request, load_implementations, run_in_subprocesses
from .compiler.gpus import DEFAULT_TARGETS, TARGETS
from .compiler.inspect_text import format_table
from .compiler.kernel_stats import KernelAnalysis, analyze_kernel
from .measure.cases import size_combinations
from .measure.rows import WRITTEN_FILES

WIDEST_LOAD = 16  # bytes
LABELS = ("op", "impl", "config", "d", "dtype", "kv", "arch")
COLUMNS: tuple[str, ...] = (*LABELS, "kernel", "registers", "spills", "shared", "tensor", "load", "wrong")


def possible_load_bytes(sizes: Mapping[str, Any], analysis: KernelAnalysis) -> int:
    """Returns the bytes that a load of keys can bring: rows of a head are contiguous, and a tile is dealt to all
    threads.
    """
    row = sizes["d"] * {"plain": 16, "int8": 8, "int4": 4}[sizes.get("kv", "plain")] // 8
    thread_bytes = row * analysis.stats.tile["BLOCK_N"] // analysis.stats.threads
    return min(WIDEST_LOAD, row & -row, 1 << max(0, thread_bytes.bit_length() - 1))


def kernel_row(sizes: Mapping[str, Any], kernel: Any) -> dict[str, Any]:
    """Returns the figures of one kernel, and its faults."""
    analysis = analyze_kernel(kernel)
    stats, gpu = analysis.stats, kernel.metadata.target
    target = TARGETS[gpu.arch if gpu.backend == "hip" else f"sm_{gpu.arch}"]
    widths = {x.base_opcode: x.bytes_per_thread for x in analysis.instructions}
    row = {name: getattr(stats, name) for name in ("kernel", "registers", "spills", "shared")}
    row["tensor"] = min(sum(loop.tensor.values()) for loop in stats.loops)
    row["load"] = min(max((widths[name] for name in loop.loads), default=0) for loop in stats.loops)
    wrong = [f"spills {stats.spills}"] if stats.spills else []
    if stats.shared > target.max_shared_per_block:
        wrong += [f"{stats.shared - target.max_shared_per_block} bytes of shared memory too many"]
    if "tt.dot" in kernel.asm["ttir"]:
        if not row["tensor"]:
            wrong += ["no tensor cores"]
        if target.triton_target.backend == "cuda" and row["load"] < (possible := possible_load_bytes(sizes, analysis)):
            wrong += [f"could load {possible}"]
    return row | {"wrong": "; ".join(wrong)}


def compile_rows(request: CompileRequest) -> list[dict[str, Any]]:
    """Returns a row for each kernel of a call; one row if it does not compile, none if it is not supported."""
    head = {"op": request.op, "impl": request.impl, "config": request.config, "arch": request.target}
    head |= {name: request.sizes.get(name, "") for name in ("d", "dtype", "kv")}
    outcome = compile_request(partial(kernel_row, request.sizes), request)
    if outcome.error:
        return [head | {"wrong": outcome.error.splitlines()[0]}]
    return [head | row for row in outcome.kernels]


def build_requests(args: argparse.Namespace) -> Iterator[CompileRequest]:
    """Yields the calls to compile. Errors: ValueError for an op that the file does not name, or a size
    that no op has.
    """
    table = tomllib.loads((config_dir() / "bench" / "compile_sweep.toml").read_text())
    if unknown := set(args.op) - table.keys():
        raise ValueError(f"configs/bench/compile_sweep.toml has no {', '.join(unknown)}; it has {', '.join(table)}")
    selected = {name: values.split(",") for name, _, values in (text.partition("=") for text in args.size)}
    size_names = {size for name in args.op or table for size in OPS[name].domain}
    if unknown := selected.keys() - size_names:
        names = ", ".join(sorted(size_names))
        raise ValueError(f"--size {', '.join(sorted(unknown))}: expected NAME=VALUE,..., a name among {names}")
    for name in args.op or table:
        for sizes in size_combinations(table[name], OPS[name]):
            if any(str(sizes[key]) not in values for key, values in selected.items() if key in sizes):
                continue
            for impl in filter(uses_triton_kernels, OPS[name].impls.values()):
                if args.impl and impl.name not in args.impl:
                    continue
                for number in range(len(impl.configs)):
                    suited = [arch for arch in args.arch if impl.suits(number, arch)]
                    yield from (CompileRequest(name, impl.name, number, arch, sizes) for arch in suited)


def run_sweep(args: argparse.Namespace) -> int:
    """Compiles, prints and writes; returns 1 if a kernel has a fault."""
    load_implementations(args.replace_kernels, peers=False)
    if not (requests := list(build_requests(args))):
        raise ValueError("no implementation and sizes are left to compile; see --impl and --size")
    rows: list[dict[str, Any]] = []
    for i, call_rows in enumerate(run_in_subprocesses(compile_rows, requests, args.workers, args.replace_kernels), 1):
        print_progress(f"{i} of {len(requests)} compiled")
        rows += call_rows
        if args.csv:
            append_csv(args.csv, call_rows)
    print_progress("")
    print(*format_table([COLUMNS, *([row.get(name, "") for name in COLUMNS] for row in rows)]), sep="\n")
    wrong = sum(bool(row["wrong"]) for row in rows)
    print(f"{len(rows)} kernels, {wrong} of them wrong")
    return int(bool(wrong))


def append_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends lines to a file, after a header if it is new."""
    WRITTEN_FILES[file] = None
    with file.open("a", newline="") as out, exclusive_lock(out):
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if not out.seek(0, os.SEEK_END):
            writer.writeheader()
        writer.writerows(rows)
        out.flush()


@tool
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("op", nargs="*", help="default: all that configs/bench/compile_sweep.toml names")
    parser.add_argument("--impl", nargs="+", help="default: all of kernels/ that launch a Triton kernel")
    parser.add_argument("--arch", default=",".join(DEFAULT_TARGETS), help="default: %(default)s")
    parser.add_argument("--size", nargs="+", default=[], metavar="NAME=VALUE,...", help="only these of the sizes")
    parser.add_argument("--replace-kernels", metavar="FOLDER", help="take these implementations, not those of kernels/")
    parser.add_argument("--workers", type=COUNT, default=2)
    parser.add_argument("--csv", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    args.arch = args.arch.split(",")
    if unknown := [name for name in args.arch if name not in TARGETS]:
        parser.error(f"--arch {', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            return run_sweep(args)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
