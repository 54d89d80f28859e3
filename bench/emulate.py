"""Counts what a compiled kernel does, without a GPU: `python -m bench.emulate int4_matmul --impl splitk --target sm_90`

The emulator runs the PTX on random arguments, aligned as production's, and counts: instructions by kind, by source line
and for each unit of useful work; sectors of a request of global memory beside the fewest that could hold its bytes;
wavefronts of an access of shared memory beside 1; bytes read and written, and work of tensor cores, beside those of the
op. `!` marks more than 1.15 of the fewest sectors and more than 1.1 wavefronts. Instructions are PTX, before ptxas.

    --against HEAD~1      the differences to a commit (`HEAD`: to the last one)
    --against NAME        the differences to another implementation
    --table FILE          no OP: a table of every implementation's own configs, as in bench/results
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vila_triton.console import print_progress
from vila_triton.limits import COUNT, COUNT_OR_ZERO
from vila_triton.registry import OPS, Impl, describe_available
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.registry.search_space import Config

from ._tool import kernels_option, tool
from .compiler.cross_compile import CompileRequest, load_implementations, run_in_subprocesses
from .compiler.inspect_text import format_sizes
from .emulator.compile import EMULATED_TARGETS
from .emulator.counters.emulated_call import emulate_call
from .emulator.counters.emulated_sizes import emulated_sizes
from .emulator.counters.table import counters_table
from .emulator.counters.text import (
    EmulatedCall,
    access_table,
    compare_calls,
    kernel_table,
    kind_table,
    line_table,
    refusal_lines,
    total_lines,
)
from .inspect import extract_kernels, is_commit, requests_in_commit, requests_of_impl, resolve_sizes
from .measure import rows
from .plots.emulated import plot_source_lines

TABLE_TARGETS = ["sm_80", "sm_90"]


def emulate_calls(
    requests: Sequence[CompileRequest], case: str, workers: int, folder: str | None, source: str = ""
) -> list[EmulatedCall]:
    """Emulates, with a line of progress. `source`: the commit that the kernels in `folder` are of."""
    calls = []
    results = run_in_subprocesses(emulate_call, requests, workers, folder)
    for i, (request, result) in enumerate(zip(requests, results), 1):
        print_progress(f"{i} of {len(requests)} emulated")
        head = {"kind": "emulate", "op": request.op, "impl": request.impl, "number": request.config}
        head |= {"config": dict(result.config), "target": request.target, "source": source, "case": case}
        head["sizes"] = dict(request.sizes)
        refusal = result.error or result.unsupported
        calls.append(EmulatedCall(request, source, [head | row for row in result.kernels], refusal, bool(result.error)))
    print_progress("")
    return calls


def build_requests(args: argparse.Namespace) -> list[CompileRequest]:
    """Returns the requests for the configs and implementations asked for.

    Errors: ValueError naming what there is no implementation, config or size of.
    """
    impls = OPS[args.op].impls
    own = [impl.name for impl in impls.values() if uses_triton_kernels(impl)]
    names = args.impl or own
    if unknown := [name for name in names if name not in impls]:
        raise ValueError(f"{args.op} has no implementation {unknown[0]!r}; there are: {describe_available(impls)}")
    if not own:
        raise ValueError(f"{args.op} has no Triton kernel; its implementations: {', '.join(impls)}")
    if without := [name for name in names if name not in own]:
        raise ValueError(f"{args.op} {without[0]} has no Triton kernel; these have: {', '.join(own)}")
    requests = []
    for name in names:
        for target in args.target:
            for number in args.config or default_numbers(args, impls[name], target):
                if number not in range(len(impls[name].configs)):
                    count = len(impls[name].configs)
                    raise ValueError(f"{args.op} {name} has no config {number}; it has {count}, from 0")
                sizes = sizes_of_config(args, impls[name], impls[name].configs[number])
                requests.append(CompileRequest(args.op, name, number, target, sizes))
    return requests


def sizes_of_config(args: argparse.Namespace, impl: Impl, config: Config) -> dict[str, Any]:
    """Returns the sizes that a config is emulated at."""
    default_sizes = emulated_sizes(OPS[args.op], impl.name, config)[0]
    return resolve_sizes(args.op, default_sizes, args.case, args.size)


def default_numbers(args: argparse.Namespace, impl: Impl, target: str) -> list[int]:
    """Returns the number of the config that a target runs by default at the sizes asked for, alone in a list."""
    names = OPS[args.op].dynamic_sizes
    size = sizes_of_config(args, impl, {})[names[0]] if names else 1
    return [list(impl.configs).index(impl.default_config(target, size))]


def table_requests(ops: Sequence[str], targets: Sequence[str]) -> list[CompileRequest]:
    """Returns the requests for every config of every implementation with a Triton kernel, at all its default sizes."""
    return [
        CompileRequest(op, impl.name, number, target, sizes)
        for op in ops
        for impl in filter(uses_triton_kernels, OPS[op].impls.values())
        for target in targets
        for number, config in enumerate(impl.configs)
        if impl.suits(number, target)
        for sizes in emulated_sizes(OPS[op], impl.name, config)
    ]


def write_table(args: argparse.Namespace) -> int:
    """Emulates all that the table holds and writes it; returns 1 if a kernel could not be emulated."""
    requests = table_requests([args.op] if args.op else list(OPS), args.target)
    calls = emulate_calls(requests, "emulate.toml", args.workers, args.replace_kernels)
    stamp = rows.stamp(torch.device("cpu"))
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text("\n".join(counters_table(calls, stamp)) + "\n")
    print(*refusal_lines(calls), f"table {args.table}", sep="\n")
    if args.json:
        rows.write(args.json, (row | stamp for x in calls for row in x.rows))
    return int(any(x.is_error for x in calls))


def run(args: argparse.Namespace) -> int:
    """Emulates, prints and writes; returns 1 if a kernel that was asked for could not be emulated, or has a fault."""
    case = args.case or "default"
    requests = build_requests(args)
    old: list[EmulatedCall] = []
    baseline: list[CompileRequest] = []
    if args.against in OPS[args.op].impls:
        requests = [x for x in requests if x.impl != args.against or args.impl]
        baseline = requests_of_impl(requests, args.against)
    elif args.against and is_commit(args.against):
        # A cache of its own, since Triton's keeps where the kernels lay.
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_CACHE_DIR=folder):
            kernels = extract_kernels(args.against, Path(folder))
            requests = requests_in_commit(requests, kernels, args.against)
            old = emulate_calls(requests, case, args.workers, kernels, args.against)
    elif args.against:
        raise ValueError(f"--against {args.against}: {args.op} has no such implementation, nor is it a commit")
    calls = iter(emulate_calls([*baseline, *requests], case, args.workers, args.replace_kernels))
    old += islice(calls, len(baseline))
    new = list(calls)
    print(f"{args.op} at {case} sizes: {format_sizes([x.request.sizes for x in new])}")
    if any(x.rows for x in [*old, *new]):
        for table in (kernel_table(old + new), total_lines(old + new), kind_table(old + new)):
            print("", *table, sep="\n")
        for table in (access_table(new), line_table(new, args.lines)):
            print("", *table, sep="\n")
    for line in (*refusal_lines(old + new), *(compare_calls(old, new, args.against) if old else ())):
        print(line)
    stamp = rows.stamp(torch.device("cpu"))
    if args.json:
        rows.write(args.json, (row | stamp for x in [*old, *new] for row in x.rows))
    if args.plot:
        shown = [row | stamp for x in [*old, *new] for row in x.rows]
        print("", *plot_source_lines(shown, args.plot, args.lines), sep="\n")
    return int(any(x.is_error for x in new))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("op", nargs="?")
    parser.add_argument("--impl", nargs="+", help="default: all of kernels/ that launch a Triton kernel")
    parser.add_argument(
        "--config", nargs="+", type=COUNT_OR_ZERO, help="numbers of configs; default: the one that the target runs"
    )
    parser.add_argument("--target", nargs="+", choices=EMULATED_TARGETS, help="default: sm_90; of a table sm_80 too")
    parser.add_argument("--case", help="a case of configs/bench/OP.toml, of which the first sizes are taken")
    parser.add_argument("--size", nargs="+", default=[], metavar="NAME=VALUE", help="other sizes, dtype among them")
    parser.add_argument("--against", metavar="COMMIT|IMPL")
    parser.add_argument("--lines", type=COUNT, default=12, help="source lines of each kernel to show; default: 12")
    parser.add_argument("--replace-kernels", metavar="FOLDER", help="take these implementations, not those of kernels/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a plot, as .png and .svg")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write a table of all configs, as Markdown")
    parser.add_argument("--workers", type=COUNT, default=2, help="processes; default: 2")
    args = parser.parse_args(argv)
    if not args.op and not args.table:
        parser.error("name an OP, or a --table to write")
    if args.table and (args.impl or args.case or args.size or args.against or args.plot):
        parser.error("--table takes OP, --target, --json, --kernels, --replace-kernels and --workers only")
    args.target = args.target or (TABLE_TARGETS if args.table else ["sm_90"])
    return args


@tool
def main() -> int:
    args = parse_arguments()
    load_implementations(args.replace_kernels, peers=False)
    if args.op and args.op not in OPS:
        raise ValueError(f"no op {args.op!r}; there are: {', '.join(OPS)}")
    return write_table(args) if args.table else run(args)


if __name__ == "__main__":
    sys.exit(main())
