"""Predicts which implementation is fastest from how many rows on: `python -m bench.choices int4_matmul --gpu H100 4090`

For every size that differs from call to call (m of a product), the cost model (bench/tuner/cost_model.py) predicts each
implementation with the config it runs on that GPU by default; seconds are summed over the shapes of the case. `*` is
the fastest, and the last column what configs/kernels.toml chooses. Nothing is run: so that file is written where no GPU
can be asked, and `bench.tune` overrules it where one can.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vila_triton.limits import COUNT
from vila_triton.registry import OPS, describe_available
from vila_triton.registry.kernel_config import configured_choices
from vila_triton.registry.size_ranges import implementation_at

from ._tool import kernels_option, tool
from .measure.cases import cases, op_names
from .tuner.cost_model import GpuModel, known_gpus, predict_seconds


def predicted_names(op: str, names: Sequence[str]) -> list[str]:
    """Returns the implementations asked for, or all whose file declares the costs of a launch.

    Errors: ValueError naming what is no implementation, or declares none.
    """
    impls = OPS[op].impls
    declared = [name for name, impl in impls.items() if impl.space and impl.space.launch_cost]
    if unknown := [name for name in names if name not in declared]:
        raise ValueError(
            f"{op}: no cost of a launch is declared for {unknown[0]!r}; it is for {describe_available(declared)}"
        )
    if not declared:
        raise ValueError(f"{op}: no implementation declares the cost of a launch")
    return list(names) or declared


def total_seconds(op: str, name: str, all_sizes: Sequence[dict[str, Any]], gpu: GpuModel) -> float:
    """Returns the predicted seconds of calls of these sizes together, each with its default config."""
    impl, size_name = OPS[op].impls[name], OPS[op].dynamic_sizes[0]
    configs = [impl.default_config(gpu.arch, sizes[size_name]) for sizes in all_sizes]
    return sum(predict_seconds(impl, config, sizes, gpu) or 0.0 for config, sizes in zip(configs, all_sizes))


def prediction_lines(op: str, names: Sequence[str], case: str, sizes: Sequence[int], gpu: GpuModel) -> Iterator[str]:
    """Yields a line for each value of the dynamic size."""
    size_name = OPS[op].dynamic_sizes[0]
    shapes = list({str({**x.sizes, size_name: 0}): dict(x.sizes) for x in cases(op, case)}.values())
    choice = configured_choices("cuda", "prefill").get(op, "reference")
    yield f"{gpu.name + ', us':32}" + "".join(f"{name:>12}" for name in names)
    for size in sizes:
        calls = [{**x, size_name: size} for x in shapes]
        seconds = [total_seconds(op, name, calls, gpu) for name in names]
        cells = (f"{1e6 * s:11.1f}{'*' if s == min(seconds) else ' '}" for s in seconds)
        chosen = dict.fromkeys(implementation_at(choice, size, sizes_of_call) for sizes_of_call in calls)
        yield f"{size_name}={size:<30}" + "".join(cells) + f"  {' or '.join(chosen)}"


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("op")
    parser.add_argument("--impl", nargs="+", default=[], help="default: all that declare the costs of a launch")
    parser.add_argument("--gpu", nargs="+", default=["H100"], help="of configs/bench/chips.toml; default: H100")
    parser.add_argument("--case", default="prefill", help="a case of configs/bench/OP.toml; default: prefill")
    parser.add_argument("--rows", nargs="+", type=COUNT, help="values of the size that differs from call to call")
    args = parser.parse_args(argv)
    if args.op not in op_names():
        raise ValueError(f"no op {args.op!r}; there are: {', '.join(OPS)}")
    if not OPS[args.op].dynamic_sizes:
        raise ValueError(f"{args.op}: no size differs from call to call")
    if unknown := [name for name in args.gpu if name not in known_gpus()]:
        raise ValueError(f"no GPU {unknown[0]!r} in configs/bench/chips.toml; there are: {', '.join(known_gpus())}")
    names = predicted_names(args.op, args.impl)
    for name in args.gpu:
        sizes = args.rows or [2**i for i in range(14)]
        print(*prediction_lines(args.op, names, args.case, sizes, known_gpus()[name]), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
