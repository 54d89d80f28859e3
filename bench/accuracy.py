"""How far from float64 is each implementation at sizes of production? `python -m bench.accuracy int4_matmul`

Every implementation runs with its first config (or --configs all) on the same random arguments, and is compared with
the reference in float64: the root mean square of the errors and the largest one, as shares of the root mean square of
the exact results. The last column says how many times that of the yardstick in float16 it is: of dequantising the
weight and multiplying with torch, for int4_matmul. Sizes and yardstick: configs/bench/error.toml. Without a GPU kernels
are interpreted. These are errors of arithmetic; that of rounding a weight to 4 bits is no implementation's.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

import tomllib

from vila_triton.paths import config_dir
from vila_triton.registry import OPS, Impl, there

from . import peers
from ._tool import tool
from .correctness.error_budget import DEVICE, LEFT_OUT, arguments, exactly
from .correctness.failure_report import refusal, release
from .correctness.guarded_memory import mapped, tensors
from .measure import rows
from .measure.cases import combinations, names
from .measure.format import brief

HALF = "float16"


def tables() -> dict[str, Any]:
    return tomllib.loads((config_dir() / "bench" / "error.toml").read_text())


def sizes_of(op: str, toy: bool) -> tuple[str, list[dict[str, Any]]]:
    """The yardstick and the sizes. Errors: ValueError for an op without any."""
    found = tables()
    if op not in names() or op not in found:
        raise ValueError(f"configs/bench/error.toml has no {op!r}; it has: {', '.join(found)}")
    table = {**found[op], **(found[op].get("toy", {}) if toy else {})}
    yardstick = table.pop("yardstick")
    table.pop("toy", None)
    return yardstick, [s for s in combinations(table, OPS[op]) if s["dtype"] not in LEFT_OUT]


def error_of(impl: Impl, config: Mapping[str, Any], args: Any, exact: torch.Tensor) -> dict[str, float] | str:
    """`rms` and `worst`, as shares of the root mean square of the exact results; or why there are none."""
    try:
        (out,) = tensors(impl(*mapped(torch.clone, args), config=config))
    except Exception as error:  # an implementation may fail in any way; the others go on
        return refusal(error)
    off, size = (out.double() - exact).abs(), exact.square().mean().sqrt()
    return {"rms": (off.square().mean().sqrt() / size).item(), "worst": (off.amax() / size).item()}


def measured(op: str, sizes: Mapping[str, Any], impls: Sequence[str], every: bool) -> Iterator[dict[str, Any]]:
    """A row for each implementation and config at these sizes."""
    here, args, exact, missing = rows.stamp(torch.device(DEVICE)), None, None, ""
    try:
        args = arguments(OPS[op], seed=0, **sizes)
        (exact,) = exactly(OPS[op], args)
    except Exception as error:  # these sizes may fail in any way; the others go on
        missing = refusal(error)
    for impl in OPS[op].impls.values():
        if impls and impl.name not in impls:
            continue
        for config in impl.configs if every else impl.configs[:1]:
            about = {"op": op, "impl": impl.name, "sizes": dict(sizes), "config": dict(config)}
            found = missing if exact is None else error_of(impl, config, args, exact)
            error = {"rms": None, "worst": None, "reason": found} if isinstance(found, str) else {**found, "reason": ""}
            yield {"kind": "error", **about, **error, **here}
            if error["reason"]:
                release(torch.device(DEVICE))


def line(row: Mapping[str, Any], yardstick: float | None) -> str:
    name = f"  {row['impl']} {brief(row['config'])}"
    if row["reason"]:
        return f"{name:44.44}  none: {row['reason']}"
    times = f"{row['rms'] / yardstick:9.2g}" if yardstick else f"{'-':>9}"
    return f"{name:44.44}{row['rms']:11.2e}{row['worst']:11.2e}{times}"


def report(args: argparse.Namespace) -> None:
    """Measure, print and write, a table for each of the sizes."""
    yardstick, sizes = sizes_of(args.op, args.toy)
    if unknown := set(args.impl) - OPS[args.op].impls.keys():
        raise ValueError(
            f"{args.op} has no implementation {', '.join(unknown)}; there are: {there(OPS[args.op].impls)}"
        )
    here = rows.stamp(torch.device(DEVICE))
    print(f"{here['device']} | torch {here['torch']} | triton {here['triton']} | {here['commit']} | {here['date']}")
    print("errors as shares of the exact results' root mean square")
    print(f"{'':44}{'rms':>11}{'worst':>11}  x {yardstick} {HALF}")
    impls = [*args.impl, yardstick] if args.impl else []
    for at in sizes:
        half = next(measured(args.op, {**at, "dtype": HALF}, [yardstick], False))
        print(f"{args.op} {' '.join(f'{k}={v}' for k, v in at.items())}")
        for row in measured(args.op, at, impls, args.configs == "all"):
            print(line(row, half["rms"]), flush=True)
            if args.out:
                rows.write(args.out, [row])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", metavar="OP", help=f"of {', '.join(tables())}")
    parser.add_argument("--impl", action="append", default=[], help="only this implementation (may be repeated)")
    parser.add_argument("--configs", choices=("first", "all"), default="first")
    parser.add_argument("--toy", action="store_true", help="few inputs: for a rehearsal")
    parser.add_argument("--peers", action="store_true", help="other libraries' kernels too, where installed")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    return parser


@tool
def main() -> int:
    args = parser().parse_args()
    names()
    if args.peers:
        for peer, reason in peers.discover().items():
            print(f"peer {peer}: not here: {reason}")
    from .peers import dense  # noqa: F401 (registers the yardstick)

    report(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
