"""Shows what the compiler made of a kernel, without a GPU: `python -m bench.inspect int4_matmul --arch sm_90 gfx942`

For every implementation, config and architecture: registers, spills, shared memory, occupancy, and the purpose of the
instructions in the main loop, down to their number per weight or per attention score; at production sizes and beside
another library's kernel where configs/bench/inspect.toml says so.

    --against HEAD~1      the differences to a commit (`HEAD`: to the last one)
    --against NAME        the differences to another implementation, other libraries' (bench/peers) included
    --asm [loop|all|LINE] the assembly of the main loop, of the kernel, or of one source line
"""

import argparse
import inspect
import linecache
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vila_triton.console import print_progress
from vila_triton.limits import COUNT_OR_ZERO
from vila_triton.ops import Int4
from vila_triton.registry import OPS, Op, describe_available
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.registry.target_configs import describe_choice

from ._tool import kernels_option, tool
from .compiler import inspect_peer
from .compiler.cross_compile import CompileRequest, compile_request, load_implementations, run_in_subprocesses
from .compiler.gpus import TARGETS
from .compiler.inspect_plot import plot_main_loops
from .compiler.inspect_text import (
    InspectedCall,
    compare_calls,
    format_sizes,
    instruction_mix_table,
    kernel_table,
    refusal_lines,
)
from .compiler.kernel_stats import KernelAnalysis, analyze_kernel, to_row
from .compiler.production_sizes import compile_spec
from .measure import rows
from .measure.cases import cases, op_names


def work_unit(op: Op) -> str | None:
    """Returns the unit that the work of an op is counted in: "weight" for int4 weights, "score" for
    attention, or None.
    """
    if any(p.annotation is Int4 for p in inspect.signature(op.reference).parameters.values()):
        return "weight"
    return "score" if "attention" in op.name else None


def query_rows_per_key(sizes: Mapping[str, Any]) -> int:
    """Returns the rows of queries that share their keys, at the sizes of attention."""
    return sizes.get("s", 1) * sizes.get("ratio", 1)


def resolve_sizes(
    op: str, default_sizes: Mapping[str, Any], case: str | None, settings: Sequence[str]
) -> dict[str, Any]:
    """Returns the first sizes of a case (or the default ones), changed as NAME=VALUE says.

    Errors: ValueError naming what is no case, no size of the op, or no value.
    """
    sizes = dict(cases(op, case)[0].sizes if case else default_sizes)
    for text in settings:
        name, _, value = text.partition("=")
        if name not in sizes or not (value.isdigit() or isinstance(sizes[name], str)):
            raise ValueError(f"--size {text}: expected NAME=VALUE, a name among {', '.join(sizes)} and its value")
        sizes[name] = value if isinstance(sizes[name], str) else type(sizes[name])(int(value))  # bias=1 is True
    return sizes


def compile_and_analyze(
    requests: Sequence[CompileRequest], case: str, folder: str | None, peers: bool, source: str = ""
) -> list[InspectedCall]:
    """Compiles and analyzes, with a line of progress. `source`: the commit that the kernels in `folder` are of."""
    inspected = []
    outcomes = run_in_subprocesses(partial(compile_request, analyze_kernel), requests, folder=folder, peers=peers)
    for i, (request, outcome) in enumerate(zip(requests, outcomes), 1):
        print_progress(f"{i} of {len(requests)} compiled")
        head = {
            "kind": "inspect",
            "op": request.op,
            "impl": request.impl,
            "number": request.config,
            "config": outcome.config,
        }
        head |= {"target": request.target, "source": source, "case": case, "sizes": dict(request.sizes)}
        unit, count = work_unit(OPS[request.op]), query_rows_per_key(request.sizes)
        inspected.append(
            InspectedCall(request, source, outcome, [head | to_row(x.stats, unit, count) for x in outcome.kernels])
        )
    print_progress("")
    return inspected


def assembly_listing(analysis: KernelAnalysis, selection: str) -> Iterator[str]:
    """Yields the instructions of the main loop, of the kernel or of one source line, under their source lines."""
    indices = range(len(analysis.instructions)) if selection == "all" or selection.isdigit() else analysis.main_loop
    previous = None
    for i in indices:
        x = analysis.instructions[i]
        if selection.isdigit() and x.line != int(selection):
            continue
        if (x.file, x.line) != previous:
            previous = x.file, x.line
            yield f"{Path(x.file).name}:{x.line}  {linecache.getline(x.file, x.line).strip()}"
        yield f"    {'>' if i in analysis.main_loop else ' '} {f'{x.label}:' if x.label else '':8}{x.text}"


def extract_kernels(ref: str, folder: Path) -> str:
    """Unpacks kernels/ of a commit; returns its folder. Errors: ValueError if there is no such commit."""
    process = subprocess.run(["git", "archive", "--format=zip", ref, "kernels"], cwd=rows.ROOT, capture_output=True)
    if process.returncode:
        raise ValueError(f"{ref!r} is no implementation and no commit: {process.stderr.decode().strip()}")
    with zipfile.ZipFile(BytesIO(process.stdout)) as archive:
        archive.extractall(folder)
    return str(folder / "kernels")


def requests_in_commit(requests: Sequence[CompileRequest], folder: str, ref: str) -> list[CompileRequest]:
    """Returns the requests for implementations whose file the commit has, and prints a line about the others.

    Errors: ValueError if it has none of them.
    """
    files = {x.impl: OPS[x.op].impls[x.impl].file.name for x in requests}
    new = [f"{impl} ({file})" for impl, file in files.items() if not (Path(folder) / file).exists()]
    kept = [x for x in requests if (Path(folder) / files[x.impl]).exists()]
    message = f"{ref} has no file of {', '.join(new)}, so there is nothing to compare with"
    if not kept:
        raise ValueError(message)
    if new:
        print(message)
    return kept


def build_requests(args: argparse.Namespace) -> list[CompileRequest]:
    """Returns the requests for the configs asked for (or all) of the implementations asked for (or all with Triton
    kernels).

    Errors: ValueError if there are none, or a number is that of no config.
    """
    impls = OPS[args.op].impls
    own_impls = [x.name for x in impls.values() if uses_triton_kernels(x) and not x.fn.__module__.startswith("bench.")]
    requests = []
    for name in args.impl or own_impls:
        count = len(impls[name].configs)
        for number in range(count) if args.config is None else args.config:
            if number not in range(count):
                raise ValueError(f"{args.op} {name} has no config {number}; it has {count}, from 0")
            default_sizes = compile_spec(OPS[args.op], name, impls[name].configs[number]).sizes
            sizes = resolve_sizes(args.op, default_sizes, args.case, args.size)
            requests += [CompileRequest(args.op, name, number, target, sizes) for target in args.arch]
    if not requests:
        raise ValueError(f"{args.op} has no Triton kernel; its implementations: {', '.join(impls)}")
    return requests


def default_config_lines(op: str, requests: Sequence[CompileRequest]) -> Iterator[str]:
    """Yields which config each implementation runs by default on each architecture that names one."""
    impls = OPS[op].impls
    for impl, target in dict.fromkeys((x.impl, x.target) for x in requests):
        if choice := impls[impl].by_target.get(target):
            yield f"{impl} on {target} by default: {describe_choice(choice, ''.join(OPS[op].dynamic_sizes[:1]))}"


def requests_of_impl(requests: Sequence[CompileRequest], impl: str) -> list[CompileRequest]:
    """Returns the same requests for another implementation; a number that it does not have becomes its first config."""
    count = len(OPS[requests[0].op].impls[impl].configs)
    return [replace(x, impl=impl, config=x.config if x.config in range(count) else 0) for x in requests]


def find_implementations(args: argparse.Namespace) -> dict[str, str] | None:
    """Registers the implementations asked for, those of other libraries (bench/peers) if need be. Returns {library:
    reason} of the libraries that cannot be used here; None if none was looked for.

    Errors: ValueError naming what is no implementation here or there, nor a commit to compare with.
    """
    if args.op not in op_names():
        raise ValueError(f"no op {args.op!r}; there are: {', '.join(OPS)}")
    load_implementations(args.replace_kernels, peers=False)
    impls = OPS[args.op].impls
    requested = {*(args.impl or []), *([args.against] if args.against and not is_commit(args.against) else [])}
    peer = compile_spec(OPS[args.op], "", {}).peer if not (args.against or args.asm) else None
    if requested <= impls.keys() and not peer:
        return None
    unusable = load_implementations(args.replace_kernels, peers=True)
    for name in sorted(requested - impls.keys()):
        why = f" ({unusable[name]})" if name in unusable else ""
        or_commit = ", nor is it a commit" if name == args.against else ""
        raise ValueError(
            f"{args.op} has no implementation {name!r}{why}{or_commit}; there are: {describe_available(impls)}"
        )
    return unusable


def run(args: argparse.Namespace) -> int:
    """Compiles, prints and writes; returns 1 if a kernel that was asked for does not compile."""
    unusable = find_implementations(args)
    peers = unusable is not None
    case = args.case or "usual"
    requests = build_requests(args)
    old: list[InspectedCall] = []
    baseline: list[CompileRequest] = []
    if args.against in OPS[args.op].impls:
        baseline = requests_of_impl(requests, args.against)
    elif args.against:
        with tempfile.TemporaryDirectory() as folder:
            kernels = extract_kernels(args.against, Path(folder))
            requests = requests_in_commit(requests, kernels, args.against)
            old = compile_and_analyze(requests, case, kernels, peers, args.against)
    peer_requests = inspect_peer.peer_requests(requests) if peers and not (args.against or args.asm) else {}
    together = [*baseline, *requests, *peer_requests.values()]
    inspected = iter(compile_and_analyze(together, case, args.replace_kernels, peers))
    old += islice(inspected, len(baseline))
    new = list(islice(inspected, len(requests)))
    inspected_peers = list(inspected)
    if args.asm:
        for x in new:
            for analysis in x.result.kernels:
                print(f"{x.request.op} {x.name} {analysis.stats.kernel}, > marks the main loop:")
                print(*assembly_listing(analysis, args.asm), sep="\n")
        return 0
    print(f"{args.op} at {case} sizes: {format_sizes([x.sizes for x in requests])}")
    if any(x.rows for x in [*old, *new]):
        print("", *kernel_table(old + new), "", *instruction_mix_table(old + new), sep="\n")
    default_lines = default_config_lines(args.op, [x.request for x in new])
    for line in (*default_lines, *refusal_lines(old + new), *(compare_calls(old, new, args.against) if old else ())):
        print(line)
    if unusable is not None and not args.against:
        print("", *inspect_peer.peer_table(new, dict(zip(peer_requests, inspected_peers)), unusable), sep="\n")
    stamp = rows.stamp(torch.device("cpu"))
    if args.json:
        rows.write(args.json, (row | stamp for x in [*old, *new, *inspected_peers] for row in x.rows))
    if args.out:
        print("", *plot_main_loops([row | stamp for x in [*old, *new] for row in x.rows], args.out), sep="\n")
    return int(not all(x.rows or x.result.unsupported for x in new))


def is_commit(name: str) -> bool:
    """Returns whether a name is that of a commit of this repository."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    return (rows.ROOT / ".git").exists() and not subprocess.run(command, cwd=rows.ROOT, capture_output=True).returncode


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("op")
    parser.add_argument("--impl", nargs="+", help="default: all of kernels/ that launch a Triton kernel")
    parser.add_argument("--config", nargs="+", type=COUNT_OR_ZERO, help="numbers of configs; default: all")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help=f"of {', '.join(TARGETS)}; default: sm_90")
    parser.add_argument("--case", help="a case of configs/bench/OP.toml, of which the first sizes are taken")
    parser.add_argument("--size", nargs="+", default=[], metavar="NAME=VALUE", help="other sizes, dtype among them")
    parser.add_argument("--against", metavar="COMMIT|IMPL")
    parser.add_argument("--asm", nargs="?", const="loop", metavar="loop|all|LINE")
    parser.add_argument("--replace-kernels", metavar="FOLDER", help="take these implementations, not those of kernels/")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--out", type=Path, help="a plot, as .png and .svg")
    args = parser.parse_args(argv)
    args.arch = [name for text in args.arch for name in text.split(",")]
    if unknown := [name for name in args.arch if name not in TARGETS]:
        parser.error(f"--arch {', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    if args.asm and args.asm not in ("loop", "all") and not args.asm.isdigit():
        parser.error(f"--asm {args.asm}: expected loop, all or the number of a source line")
    if args.asm and (args.against or args.json or args.out):
        parser.error("--asm prints assembly and nothing else: leave out --against, --json and --out")
    return args


@tool
def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # Triton's own keeps the places of whoever compiled first
        return run(args)


if __name__ == "__main__":
    sys.exit(main())
