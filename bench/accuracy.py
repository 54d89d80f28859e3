"""Compares every implementation of an op with float64 at production sizes: `python -m bench.accuracy int4_matmul`

Every implementation runs with its first config (or --configs all) on the same random arguments and is compared with the
reference in float64. The columns are the root mean square of the errors and the largest error, as shares of the root
mean square of the exact results, and the first as a multiple of the yardstick's in float16: for int4_matmul,
dequantizing the weight and multiplying with torch. Sizes and yardstick are in configs/bench/accuracy.toml. Without a
GPU kernels are interpreted. These are errors of arithmetic; the error of quantizing a weight to 4 bits is not among
them.
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
from vila_triton.registry import OPS, Impl, describe_available

from . import peers
from ._tool import kernels_option, tool
from .correctness.error_budget import DEVICE, UNSUPPORTED_DTYPES, example_args, float64_reference
from .correctness.failure_report import refusal_reason, release_memory
from .correctness.guarded_memory import map_tensors, tensors
from .measure import rows
from .measure.cases import op_names, size_combinations
from .measure.format import format_config

YARDSTICK_DTYPE = "float16"


def read_tables() -> dict[str, Any]:
    """Returns configs/bench/accuracy.toml."""
    return tomllib.loads((config_dir() / "bench" / "accuracy.toml").read_text())


def yardstick_and_sizes(op: str, toy: bool) -> tuple[str, list[dict[str, Any]]]:
    """Returns the yardstick and the sizes of an op. Errors: ValueError for an op without any."""
    tables = read_tables()
    if op not in op_names() or op not in tables:
        raise ValueError(f"configs/bench/accuracy.toml has no {op!r}; it has: {', '.join(tables)}")
    table = {**tables[op], **(tables[op].get("toy", {}) if toy else {})}
    yardstick = table.pop("yardstick")
    table.pop("toy", None)
    return yardstick, [s for s in size_combinations(table, OPS[op]) if s["dtype"] not in UNSUPPORTED_DTYPES]


def relative_error(impl: Impl, config: Mapping[str, Any], args: Any, exact: torch.Tensor) -> dict[str, float] | str:
    """Returns `rms` and `worst`, as shares of the root mean square of the exact results, or the reason why there are
    none.
    """
    try:
        (out,) = tensors(impl(*map_tensors(torch.clone, args), config=config))
    except Exception as error:  # an implementation may fail in any way; the others go on
        return refusal_reason(error)
    difference, size = (out.double() - exact).abs(), exact.square().mean().sqrt()
    return {"rms": (difference.square().mean().sqrt() / size).item(), "worst": (difference.amax() / size).item()}


def measure(op: str, sizes: Mapping[str, Any], impls: Sequence[str], all_configs: bool) -> Iterator[dict[str, Any]]:
    """Yields a row for each implementation and config at these sizes."""
    stamp, args, exact, missing = rows.stamp(torch.device(DEVICE)), None, None, ""
    try:
        args = example_args(OPS[op], seed=0, **sizes)
        (exact,) = float64_reference(OPS[op], args)
    except Exception as error:  # these sizes may fail in any way; the others go on
        missing = refusal_reason(error)
    for impl in OPS[op].impls.values():
        if impls and impl.name not in impls:
            continue
        for config in impl.configs if all_configs else impl.configs[:1]:
            fields = {"op": op, "impl": impl.name, "sizes": dict(sizes), "config": dict(config)}
            result = missing if exact is None else relative_error(impl, config, args, exact)
            error = (
                {"rms": None, "worst": None, "reason": result} if isinstance(result, str) else {**result, "reason": ""}
            )
            yield {"kind": "error", **fields, **error, **stamp}
            if error["reason"]:
                release_memory(torch.device(DEVICE))


def format_row(row: Mapping[str, Any], yardstick: float | None) -> str:
    """Returns one line of the table."""
    name = f"  {row['impl']} {format_config(row['config'])}"
    if row["reason"]:
        return f"{name:44.44}  none: {row['reason']}"
    multiple = f"{row['rms'] / yardstick:9.2g}" if yardstick else f"{'-':>9}"
    return f"{name:44.44}{row['rms']:11.2e}{row['worst']:11.2e}{multiple}"


def measure_and_print(args: argparse.Namespace) -> None:
    """Measures, prints and writes, a table for each of the sizes."""
    yardstick, sizes = yardstick_and_sizes(args.op, args.toy)
    if unknown := set(args.impl) - OPS[args.op].impls.keys():
        raise ValueError(
            f"{args.op} has no implementation {', '.join(unknown)}; there are: {describe_available(OPS[args.op].impls)}"
        )
    stamp = rows.stamp(torch.device(DEVICE))
    print(
        f"{stamp['device']} | torch {stamp['torch']} | triton {stamp['triton']} | {stamp['commit']} | {stamp['date']}"
    )
    print("errors as shares of the exact results' root mean square")
    print(f"{'':44}{'rms':>11}{'worst':>11}  x {yardstick} {YARDSTICK_DTYPE}")
    impls = [*args.impl, yardstick] if args.impl else []
    for case_sizes in sizes:
        baseline = next(measure(args.op, {**case_sizes, "dtype": YARDSTICK_DTYPE}, [yardstick], False))
        print(f"{args.op} {' '.join(f'{k}={v}' for k, v in case_sizes.items())}")
        for row in measure(args.op, case_sizes, impls, args.configs == "all"):
            print(format_row(row, baseline["rms"]), flush=True)
            if args.out:
                rows.write(args.out, [row])


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line of `python -m bench.accuracy`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("op", metavar="OP", help=f"of {', '.join(read_tables())}")
    parser.add_argument("--impl", action="append", default=[], help="only this implementation (may be repeated)")
    parser.add_argument("--configs", choices=("first", "all"), default="first")
    parser.add_argument("--toy", action="store_true", help="few inputs: for a rehearsal")
    parser.add_argument("--peers", action="store_true", help="other libraries' kernels too, where installed")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    return parser


@tool
def main() -> int:
    args = build_parser().parse_args()
    op_names()
    if args.peers:
        for peer, reason in peers.discover_peers().items():
            print(f"peer {peer}: not here: {reason}")
    from .peers import dense  # noqa: F401 (registers the yardstick)

    measure_and_print(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
