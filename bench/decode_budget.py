"""The cost of one decoded token: launches, waits of the host, Python, and the predicted time of every kernel, per GPU:
`python -m bench.decode_budget --model llama3-vila1.5-8b`

The engine's step runs here with a GPU's kernels, compiled for it and not launched. Kernels have the seconds that their
bytes, instructions and latencies allow at least (bench/measure/token_time.py); what others measured is printed beside
what the same bounds say of it, so that it is known how far a prediction may be off. `limit` is all bytes of the step
over the datasheet's bandwidth. Python's time is that of this machine's CPU, for a narrow model with as many layers:
`with a graph` is all that the engine does for a token besides replaying it.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vila_triton.console import print_progress
from vila_triton.limits import COUNT
from vila_triton.registry import OPS

from ._tool import kernels_option, tool
from .measure import decode_step, launch_work, model_configs, rows, step_cost, token_time
from .standin.device import WAITING

GROUPS = {"int4": 128, "bfloat16": None, "float16": None}
GPUS = ("H100", "A100", "4090", "Orin")


@dataclass(frozen=True)
class KernelRow:
    """Equal launches of a token: how many, their bytes and the predicted seconds of each, and what limits them."""

    op: str
    kernel: str
    count: int
    least_bytes: float
    issued: float
    seconds: float
    limit: str


def kernel_rows(calls: Sequence[decode_step.Call], on: token_time.Gpu, counters: bool = False) -> list[KernelRow]:
    """Returns the launches of a token, equal ones together, in the order in which they come. counters: with the time
    that those with a declared cost lose to memory that they access badly.
    """
    groups: dict[Any, list[decode_step.Call]] = {}
    for call in calls:
        key = call.op, call.impl, call.sizes, call.first, call.kernel, call.launch and call.launch.grid
        groups.setdefault(key if call.op else "torch", []).append(call)
    found = []
    for group in groups.values():
        call = group[0]
        work = launch_work.work_of(call)
        time, wasted = token_time.predict(work, on), 0.0
        if counters and call.first and call.launch and OPS[call.op].impls[call.impl].space:
            wasted = launch_work.wasted_by(call.op, call.impl, call.config, call.sizes, on.name)
        op = f"{call.op} {call.impl}" if call.op else "-"
        kernel = call.kernel if call.op else "operators of torch"
        found.append(
            KernelRow(op, kernel, len(group), work.least_bytes, work.issued, time.seconds + wasted, time.limit)
        )
    return found


def table(found: Sequence[KernelRow]) -> Iterator[str]:
    """Yields a line for each kernel."""
    yield f"  {'op':28}{'kernel':32}{'launches':>8}{'MB each':>9}{'us each':>9}{'us':>9}  limit"
    for row in found:
        total = row.count * row.seconds
        figures = f"{row.count:8}{row.least_bytes / 1e6:9.2f}{row.seconds * 1e6:9.2f}{total * 1e6:9.1f}"
        yield f"  {row.op:28.28}{row.kernel:32.32}{figures}  {row.limit}"


def error_lines() -> Iterator[str]:
    """Yields a line for each published measurement: what the bounds say of it."""
    yield "the same bounds and what others measured (configs/bench/token_times.toml):"
    for row, predicted, error in token_time.errors():
        scale, unit = (1e-9, "GB/s") if "rate" in row else (1e6, "us")
        measured = row["rate"] if "rate" in row else row["seconds"]
        figures = f"{predicted * scale:9.1f} predicted {measured * scale:9.1f} measured, {unit:5}{error:+7.1%}"
        yield f"  {row['gpu']:6}{row['name']:32}{figures}"


def budget(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each GPU, after printing its kernels."""
    group_size = GROUPS[args.weights]
    model = model_configs.load_model(args.model, args.layers, group_size)
    dtype = torch.bfloat16 if group_size else getattr(torch, args.weights)
    cost = step_cost.language_cost(model.llm, args.batch, 1, args.context - 1, dtype)
    print_progress("timing Python", is_last=True)
    target = token_time.gpu(args.gpu[0]).arch
    python = decode_step.python_seconds(model.llm, args.batch, args.context, target, args.rounds)
    with_graph = decode_step.graph_seconds(model.llm, args.context, args.rounds)
    for name in args.gpu:
        on = token_time.gpu(name)
        print_progress(f"compiling for {name}", is_last=True)
        calls = decode_step.launches(model.llm, dtype, args.batch, args.context, on.arch)
        found = kernel_rows(calls, on, args.counters)
        kernels = sum(row.count * row.seconds for row in found)
        graph = max(kernels + len(calls) * token_time.gap(), with_graph)
        limit = cost.bytes / on.bandwidth
        waits = sum(call.kernel in WAITING for call in calls)
        triton = sum(call.launch is not None for call in calls)
        gaps, without = len(calls) * token_time.gap(), max(graph, python)
        print(
            f"\n{name} ({on.arch}), {model.name}, {args.weights}, batch {args.batch}, after {args.context} tokens: "
            f"{len(calls)} launches, {triton} of Triton's kernels; {waits} waits of the host",
            *table(found),
            f"  a token: limit {limit * 1e3:.3f} ms; with a graph {graph * 1e3:.3f} ms, {gaps * 1e3:.3f} of it gaps: "
            f"{limit / graph:.0%} of bandwidth; without {without * 1e3:.3f} ms",
            f"  Python: with a graph {with_graph * 1e3:.2f} ms, without {python * 1e3:.2f} ms",
            sep="\n",
            flush=True,
        )
        yield {
            "kind": "budget", "gpu": name, "model": args.model, "weights": args.weights, "batch": args.batch,
            "context": args.context, "layers": model.llm.num_hidden_layers, "launches": len(calls), "triton": triton,
            "waits": waits, "limit_seconds": limit, "graph_seconds": graph, "python_seconds": python,
            "python_graph_seconds": with_graph, "bytes": cost.bytes,
            "kernels": [vars(row) for row in found], **rows.stamp(torch.device("cpu")),
        }  # fmt: skip


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--model", default="llama3-vila1.5-8b", help="a name of configs/models, or a .toml file")
    parser.add_argument("--layers", type=COUNT, help="only so many of the language model's")
    parser.add_argument("--weights", choices=GROUPS, default="int4")
    parser.add_argument("--batch", type=COUNT, default=1)
    parser.add_argument("--context", type=COUNT, default=512, help="tokens that a new one attends to, itself included")
    parser.add_argument("--gpu", nargs="+", choices=token_time.known_names(), default=list(GPUS))
    parser.add_argument(
        "--counters", action="store_true", help="emulate the kernels, too, for uncoalesced accesses and bank conflicts"
    )
    parser.add_argument("--rounds", type=COUNT, default=30, help="steps of which Python's least time is taken")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for row in budget(args):
        if args.out:
            rows.write(args.out, [row])
    print("", *error_lines(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
