"""What did the compiler make of a kernel? No GPU needed: `python -m bench.inspect int4_matmul --arch sm_90 gfx942`

For every implementation, config and architecture: registers, spills, shared memory, occupancy, and what the
instructions of the main loop are for, down to the number of them per weight or per attention score. At sizes of
production, and beside another library's kernel, where configs/bench/inspect.toml says so.

    --against HEAD~1      what changed since a commit (or `HEAD`: since the last one)
    --against NAME        the difference to another implementation, other libraries' (bench/peers) included
    --asm [loop|all|LINE] the assembly of the main loop, of the kernel, or what one source line became
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
from pathlib import Path
from typing import Any

import torch

from vila_triton.console import bar
from vila_triton.limits import MANY
from vila_triton.ops import Int4
from vila_triton.registry import OPS, Op, there
from vila_triton.registry.interpreter import holds_kernels

from ._tool import tool
from .compiled import Call, compile_call, elsewhere, prepare
from .compiler import inspect_peer as beside
from .compiler.gpus import TARGETS
from .compiler.inspect_plot import draw
from .compiler.inspect_text import Found, compare, mixtures, refusals, spelled, table
from .compiler.kernel_stats import Dissection, dissect, figures
from .compiler.production_sizes import production
from .measure import rows
from .measure.cases import cases, names


def unit_of(op: Op) -> str | None:
    """What the work of an op is counted in: int4 weights, attention scores, or nothing."""
    if any(p.annotation is Int4 for p in inspect.signature(op.reference).parameters.values()):
        return "weight"
    return "score" if "attention" in op.name else None


def rows_of(sizes: Mapping[str, Any]) -> int:
    """How many rows of queries share their keys, at the sizes of attention."""
    return sizes.get("s", 1) * sizes.get("ratio", 1)


def sizes_of(op: str, usual: Mapping[str, Any], case: str | None, given: Sequence[str]) -> dict[str, Any]:
    """The first sizes of a case (or the usual ones), changed as NAME=VALUE says.

    Errors: ValueError naming what is no case, no size of the op, or no value.
    """
    sizes = dict(cases(op, case)[0].sizes if case else usual)
    for text in given:
        name, _, value = text.partition("=")
        if name not in sizes or not (value.isdigit() or isinstance(sizes[name], str)):
            raise ValueError(f"--size {text}: expected NAME=VALUE, a name among {', '.join(sizes)} and its value")
        sizes[name] = value if isinstance(sizes[name], str) else type(sizes[name])(int(value))  # bias=1 is True
    return sizes


def look(calls: Sequence[Call], case: str, folder: str | None, peers: bool, source: str = "") -> list[Found]:
    """Compile and take apart, with a line of progress. `source`: the commit that the kernels in `folder` are of."""
    found = []
    outcomes = elsewhere(partial(compile_call, dissect), calls, folder=folder, peers=peers)
    for i, (call, outcome) in enumerate(zip(calls, outcomes), 1):
        bar(f"{i} of {len(calls)} compiled")
        head = {"kind": "inspect", "op": call.op, "impl": call.impl, "number": call.config, "config": outcome.config}
        head |= {"target": call.target, "source": source, "case": case, "sizes": dict(call.sizes)}
        unit, count = unit_of(OPS[call.op]), rows_of(call.sizes)
        found.append(Found(call, source, outcome, [head | figures(x.anatomy, unit, count) for x in outcome.kernels]))
    bar("")
    return found


def listing(found: Dissection, what: str) -> Iterator[str]:
    """The instructions of the main loop, of the kernel, or of one source line, under the source lines they are of."""
    chosen = range(len(found.code)) if what == "all" or what.isdigit() else found.main
    above = None
    for i in chosen:
        x = found.code[i]
        if what.isdigit() and x.line != int(what):
            continue
        if (x.file, x.line) != above:
            above = x.file, x.line
            yield f"{Path(x.file).name}:{x.line}  {linecache.getline(x.file, x.line).strip()}"
        yield f"    {'>' if i in found.main else ' '} {f'{x.label}:' if x.label else '':8}{x.text}"


def kernels_of(ref: str, folder: Path) -> str:
    """kernels/ of a commit, unpacked. Errors: ValueError if there is no such commit."""
    done = subprocess.run(["git", "archive", "--format=zip", ref, "kernels"], cwd=rows.ROOT, capture_output=True)
    if done.returncode:
        raise ValueError(f"{ref!r} is no implementation and no commit: {done.stderr.decode().strip()}")
    with zipfile.ZipFile(BytesIO(done.stdout)) as archive:
        archive.extractall(folder)
    return str(folder / "kernels")


def of_commit(calls: Sequence[Call], folder: str, ref: str) -> list[Call]:
    """The calls of implementations whose file a commit has, its kernels/ being in the folder; of the others a line.

    Errors: ValueError if it has none of them.
    """
    files = {x.impl: OPS[x.op].impls[x.impl].file.name for x in calls}
    new = [f"{impl} ({file})" for impl, file in files.items() if not (Path(folder) / file).exists()]
    kept = [x for x in calls if (Path(folder) / files[x.impl]).exists()]
    said = f"{ref} has no file of {', '.join(new)}, so there is nothing to compare with"
    if not kept:
        raise ValueError(said)
    if new:
        print(said)
    return kept


def calls_of(args: argparse.Namespace) -> list[Call]:
    """The calls to compile: the configs asked for, or all, of the implementations asked for, or of all with kernels.

    Errors: ValueError if there are none, or a number is that of no config.
    """
    impls = OPS[args.op].impls
    ours = [x.name for x in impls.values() if holds_kernels(x) and not x.fn.__module__.startswith("bench.")]
    calls = []
    for name in args.impl or ours:
        count = len(impls[name].configs)
        for number in range(count) if args.config is None else args.config:
            if number not in range(count):
                raise ValueError(f"{args.op} {name} has no config {number}; it has {count}, from 0")
            usual = production(OPS[args.op], name, impls[name].configs[number]).sizes
            sizes = sizes_of(args.op, usual, args.case, args.size)
            calls += [Call(args.op, name, number, target, sizes) for target in args.arch]
    if not calls:
        raise ValueError(f"{args.op} has no Triton kernel; its implementations: {', '.join(impls)}")
    return calls


def others(calls: Sequence[Call], impl: str) -> list[Call]:
    """The same calls of another implementation; a number it does not have is its first config."""
    count = len(OPS[calls[0].op].impls[impl].configs)
    return [replace(x, impl=impl, config=x.config if x.config in range(count) else 0) for x in calls]


def find(args: argparse.Namespace) -> dict[str, str] | None:
    """Find the implementations asked for, in other libraries (bench/peers) if need be. Returns {library: why not} of
    those that cannot be used here; None if none was looked for.

    Errors: ValueError naming what is neither here nor there, nor a commit to compare with.
    """
    if args.op not in names():
        raise ValueError(f"no op {args.op!r}; there are: {', '.join(OPS)}")
    prepare(args.kernels, peers=False)
    impls = OPS[args.op].impls
    asked = {*(args.impl or []), *([args.against] if args.against and not is_commit(args.against) else [])}
    shown = production(OPS[args.op], "", {}).beside if not (args.against or args.asm) else None
    if asked <= impls.keys() and not shown:
        return None
    unusable = prepare(args.kernels, peers=True)
    for name in sorted(asked - impls.keys()):
        why = f" ({unusable[name]})" if name in unusable else ""
        or_commit = ", nor is it a commit" if name == args.against else ""
        raise ValueError(f"{args.op} has no implementation {name!r}{why}{or_commit}; there are: {there(impls)}")
    return unusable


def run(args: argparse.Namespace) -> int:
    unusable = find(args)
    peers = unusable is not None
    case = args.case or "usual"
    calls = calls_of(args)
    old: list[Found] = []
    if args.against and args.against not in OPS[args.op].impls:
        with tempfile.TemporaryDirectory() as folder:
            calls = of_commit(calls, before := kernels_of(args.against, Path(folder)), args.against)
            old = look(calls, case, before, peers, args.against)
    before = others(calls, args.against) if args.against and not old else []
    rivals = beside.calls(calls) if peers and not (args.against or args.asm) else {}
    found = look([*before, *calls, *rivals.values()], case, args.kernels, peers)
    old, new, theirs = old + found[: len(before)], found[len(before) :][: len(calls)], found[len(before) + len(calls) :]
    if args.asm:
        for x in new:
            for found in x.outcome.kernels:
                print(f"{x.call.op} {x.name} {found.anatomy.kernel}, > marks the main loop:")
                print(*listing(found, args.asm), sep="\n")
        return 0
    print(f"{args.op} at {case} sizes: {spelled([x.sizes for x in calls])}")
    if any(x.rows for x in [*old, *new]):
        print("", *table(old + new), "", *mixtures(old + new), sep="\n")
    for line in (*refusals(old + new), *(compare(old, new, args.against) if old else ())):
        print(line)
    if unusable is not None and not (args.against or args.asm):
        print("", *beside.table(new, dict(zip(rivals, theirs)), unusable), sep="\n")
    stamp = rows.stamp(torch.device("cpu"))
    if args.json:
        rows.write(args.json, (row | stamp for x in [*old, *new, *theirs] for row in x.rows))
    if args.out:
        print("\n" + "\n".join(map(str, draw([row | stamp for x in [*old, *new] for row in x.rows], args.out))))
    return int(not all(x.rows or x.outcome.unsupported for x in new))


def is_commit(name: str) -> bool:
    command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    return not subprocess.run(command, cwd=rows.ROOT, capture_output=True).returncode


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op")
    parser.add_argument("--impl", nargs="+", help="default: all of kernels/ that launch a Triton kernel")
    parser.add_argument("--config", nargs="+", type=MANY, help="numbers of configs; default: all")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help=f"of {', '.join(TARGETS)}; default: sm_90")
    parser.add_argument("--case", help="a case of configs/bench/OP.toml, of which the first sizes are taken")
    parser.add_argument("--size", nargs="+", default=[], metavar="NAME=VALUE", help="other sizes, dtype among them")
    parser.add_argument("--against", metavar="COMMIT|IMPL")
    parser.add_argument("--asm", nargs="?", const="loop", metavar="loop|all|LINE")
    parser.add_argument("--kernels", metavar="FOLDER", help="take the implementations from here, not from kernels/")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--out", type=Path, help="a picture, as .png and .svg")
    args = parser.parse_args(words)
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
    args = arguments()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # Triton's own keeps the places of whoever compiled first
        return run(args)


if __name__ == "__main__":
    sys.exit(main())
