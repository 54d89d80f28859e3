"""The predicted time of what runs by default on a GPU, and its share of the bandwidth: `python -m bench.predict OP`

Each case of configs/bench/OP.toml is called with the GPU's implementation and config, compiled for it and not launched.
A launch has the seconds that its bytes, instructions and latencies allow at least (bench/measure/token_time.py); behind
all launches but the last lies the gap to the next in a graph. `of bandwidth`: the bytes that must move, over these
seconds and the datasheet's bandwidth; the last line is the geometric mean of a case.

    --case NAME     these cases only, as kernelbench_hard
    --gpu NAME ...  on these GPUs
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vila_triton.registry import OPS, REFERENCE, Impl
from vila_triton.registry.kernel_config import configured_choices
from vila_triton.registry.size_ranges import implementation_at

from ._tool import kernels_option, tool
from .compiler.cross_compile import meta_arguments
from .compiler.inspect_text import format_table
from .measure import launch_work, token_time
from .measure.cases import Case, cases
from .measure.decode_step import Call
from .measure.no_launches import DriverLaunch, without_launching

COLUMNS = ("sizes", "impl", "kernel", "programs", "MB", "us", "limit", "of bandwidth")


def gpu_impl(case: Case, target: str) -> tuple[Impl, Mapping[str, Any]]:
    """Returns the implementation and the config that configs/kernels.toml and its file name for a GPU."""
    op = OPS[case.op]
    size = case.sizes[op.dynamic_sizes[0]] if op.dynamic_sizes else 1
    choice = configured_choices("cuda", "decode").get(op.name, REFERENCE)
    impl = op.impls[implementation_at(choice, size, case.sizes)]
    return impl, impl.default_config(target, size)


def launches_of(case: Case, target: str) -> list[Call]:
    """Returns the launches of the default implementation at the sizes of a case. Errors: ValueError if it has none."""
    found: list[DriverLaunch] = []
    impl, config = gpu_impl(case, target)
    with without_launching(target, found.append), torch.inference_mode():
        impl(*meta_arguments(case.op, tuple(case.sizes.items())), config=config)
    if not found:
        raise ValueError(f"{case}: {impl.name} launches no Triton kernel, there is nothing to predict")
    sizes, settings = tuple(case.sizes.items()), tuple(config.items())
    return [Call(case.op, impl.name, sizes, settings, i == 0, launch.kernel, launch) for i, launch in enumerate(found)]


def case_rows(case: Case, on: token_time.Gpu) -> tuple[list[tuple[str, ...]], float]:
    """Returns a line for each launch of a case, and the share of the bandwidth that they reach together."""
    calls = launches_of(case, on.arch)
    predicted = [token_time.predict(launch_work.work_of(call), on) for call in calls]
    seconds = sum(x.seconds for x in predicted) + (len(calls) - 1) * token_time.gap()
    share = case.cost[1] / seconds / on.bandwidth
    sizes = " ".join(f"{name}={size}" for name, size in case.sizes.items())
    lines = []
    for call, time in zip(calls, predicted):
        assert call.launch
        programs = math.prod(call.launch.grid)
        figures = f"{programs}", f"{case.cost[1] / 1e6:.1f}", f"{time.seconds * 1e6:.2f}", time.limit
        lines.append((sizes, call.impl, call.kernel, *figures, f"{share:.0%}"))
    return lines, share


def tables(op: str, case_name: str | None, gpu_names: Sequence[str]) -> Iterator[str]:
    """Yields the table of each GPU, and under it the mean of each case."""
    for name in gpu_names:
        on, lines, shares = token_time.gpu(name), [COLUMNS], dict[str, list[float]]()
        for case in cases(op, case_name):
            found, share = case_rows(case, on)
            lines += found
            shares.setdefault(case.name, []).append(share)
        yield f"\n{name} ({on.arch}), {on.bandwidth / 1e9:.0f} GB/s"
        yield from format_table(lines)
        for case_title, some in shares.items():
            yield f"{case_title}: {math.exp(sum(map(math.log, some)) / len(some)):.1%} of bandwidth, geometric mean"


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("op", help="an op of which configs/bench has cases")
    parser.add_argument("--case", help="a table of configs/bench/OP.toml")
    parser.add_argument("--gpu", nargs="+", choices=token_time.known_names(), default=["H100"])
    args = parser.parse_args(argv)
    print(*tables(args.op, args.case, args.gpu), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
