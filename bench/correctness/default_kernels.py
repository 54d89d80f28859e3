"""Check all implementations that run by default on this machine: `python -m bench.correctness --seconds 150`

Every kernel is compared with float64, with its first config and with the configs of a tuned table of this device, in
three dtypes, in aligned and in strided memory, at the sizes of configs/bench/correctness.toml, which are a little more
than a few tiles. The most valuable items come first: half precision before float32, defaults before other
implementations, int4 and attention before the rest, gradients last. Worker processes take one item after another; a
worker that dies, or whose CUDA context breaks, costs only its item. Without a GPU the defaults of a GPU are checked in
Triton's interpreter, which has no bfloat16.

Each item gives a line and, with --out, a row of kind "correctness". Exit code: 0 nothing is wrong, 1 something is wrong
or nothing was reached, 2 the command failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

from triton import knobs

from vila_triton.hashing import canonical_json
from vila_triton.limits import COUNT, POSITIVE
from vila_triton.paths import config_dir
from vila_triton.registry import OPS, REFERENCE, Impl, OneOf, Op, Unsupported, discover, tuned_tables
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.registry.kernel_config import PHASES, configured_choices
from vila_triton.registry.search_space import Config
from vila_triton.registry.size_ranges import implementation_names
from vila_triton.registry.sources import kernel_paths
from vila_triton.registry.target_configs import current_target

from .. import standin
from .._tool import kernels_option, tool
from ..measure import rows
from .error_budget import DEVICE, UNSUPPORTED_DTYPES, shared_example
from .failure_report import format_settings
from .find_failure import gpu_responds
from .gate import find_fault
from .guarded_memory import MEMORY_LAYOUTS

PYTHON_COMMAND = standin.command_prefix()  # starts a worker
COMPILE_SECONDS = 1.5  # of a kernel, about
EXIT_SECONDS = 10  # that a worker may take to exit by itself


@dataclass(frozen=True)
class Item:
    """One config of an implementation at some sizes, to be checked in both memory layouts.

    default  true if it runs by default on a GPU, in some phase and at some sizes
    usual    true if the sizes are those that all dtypes and implementations are checked at
    """

    op: str
    impl: str
    config: Config
    sizes: Mapping[str, Any]
    default: bool
    usual: bool

    def __str__(self) -> str:
        return f"{self.op}-{self.impl} {format_settings(self.sizes)}"

    @property
    def rank(self) -> tuple[bool, ...]:
        """A sort key: the most valuable first."""
        first = self.op.startswith("int4") or self.op.endswith("attention")
        gradient = self.op.endswith("_backward")
        return self.sizes["dtype"] == "float32", not self.usual, not self.default, gradient, not first


def sizes_to_check(op: Op, impl: str) -> list[dict[str, Any]]:
    """The usual sizes, then those with one of them changed. Errors: ValueError for a size the op does not have."""
    table = tomllib.loads((config_dir() / "bench" / "correctness.toml").read_text()).get(op.name, {})
    sizes = {name: value for name, value in table.items() if name != "impl"} | table.get("impl", {}).get(impl, {})
    if unknown := set(sizes) - set(op.domain):
        raise ValueError(f"correctness.toml: {op.name} has no size {', '.join(sorted(unknown))}")
    usual = {name: domain.values[0] if isinstance(domain, OneOf) else domain.high for name, domain in op.domain.items()}
    usual |= {name: value[0] if isinstance(value, list) else value for name, value in sizes.items()}
    lists = {name: value for name, value in sizes.items() if isinstance(value, list)}
    return [usual, *({**usual, name: value} for name, values in lists.items() for value in values[1:])]


def default_impls(device: torch.device) -> set[tuple[str, str]]:
    """(op, implementation) of all defaults on this GPU, or without a GPU, on any."""
    gpu = device.type == "cuda"
    read = partial(tuned_tables.default_choices_for, device) if gpu else partial(configured_choices, "cuda")
    choices = [item for phase in PHASES for item in read(phase).items()]
    return {(op, impl) for op, choice in choices for impl in implementation_names(choice)}


def configs_to_check(impl: Impl, device: torch.device) -> list[Config]:
    """The first config, the defaults of this device's target, and those of its tuned table."""
    name = tuned_tables.gpu_name(device)
    entry = tuned_tables.valid_entry(impl, name) if name else None
    tuned_configs = (
        [*(size_range["config"] for size_range in entry["ranges"]), entry["otherwise"]["config"]] if entry else []
    )
    own = [impl.configs[0], *impl.default_configs(current_target())]
    return list({canonical_json(dict(config)): config for config in own + tuned_configs}.values())


def all_items(device: torch.device) -> list[Item]:
    """All items, the most valuable first."""
    discover()
    by_default = default_impls(device)
    result = []
    for op in OPS.values():
        for impl in op.impls.values():
            default = (op.name, impl.name) in by_default
            if impl.name == REFERENCE or not (default or uses_triton_kernels(impl)):
                continue
            dtypes = op.domain["dtype"]
            assert isinstance(dtypes, OneOf)
            for (number, sizes), dtype in product(enumerate(sizes_to_check(op, impl.name)), dtypes.values):
                dtype_sizes = {**sizes, "dtype": dtype}
                result += [
                    Item(op.name, impl.name, x, dtype_sizes, default, not number)
                    for x in configs_to_check(impl, device)
                ]
    return sorted(result, key=lambda item: item.rank)


def check_item(item: Item) -> dict[str, Any]:
    """The result of an item: state, reason, number of compiled kernels, seconds of compiling and in all."""
    start, compiling = time.perf_counter(), []

    def on_compile(times: Any, cache_hit: bool, **_: Any) -> None:
        compiling.extend([] if cache_hit else [times.total / 1e6])

    impl, states, reasons = OPS[item.op].impls[item.impl], [], []
    knobs.compilation.listener = on_compile
    try:
        for layout in MEMORY_LAYOUTS:
            try:
                fault = find_fault(shared_example(OPS[item.op], 0, **item.sizes), impl, item.config, layout)
                states.append("wrong" if fault else "right")
                reasons += [fault] if fault else []
            except Unsupported as reason:
                states.append("unsupported")
                reasons.append(f"{layout}: {reason}")
    finally:
        knobs.compilation.listener = None
    state = next(state for state in ("wrong", "right", "unsupported") if state in states)
    timing = {"compiled": len(compiling), "compiling": sum(compiling), "seconds": time.perf_counter() - start}
    return {"state": state, "reason": "; ".join(dict.fromkeys(reasons)), **timing, "alive": gpu_responds()}


def serve_items() -> None:
    """Check the items on standard input, one a line, and print their results. Exits when the input ends."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # kernels may print, which is no result
    requests: SimpleQueue[str] = SimpleQueue()

    def receive() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # even during an item

    discover()
    Thread(target=receive, daemon=True).start()
    while True:
        print(json.dumps(check_item(Item(**json.loads(requests.get())))), file=output, flush=True)


class Worker:
    """One process `python -m bench.correctness --work`; it exits when its standard input ends."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the object)
        self.process = subprocess.Popen(
            [*PYTHON_COMMAND, "bench.correctness", "--work", *(f"--kernels={path}" for path in kernel_paths())],
            cwd=rows.CHILD_FOLDER,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, item: Item) -> dict[str, Any]:
        """The result of the item; if the process died of it, the state "crashed"."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(asdict(item)), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line.endswith("\n"):
            return json.loads(line)
        return {"state": "crashed", "reason": self.exit_reason(), "alive": False}

    def exit_reason(self) -> str:
        """The last line that the process wrote, or the signal that ended it."""
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its process died of signal {-code}" if code < 0 or not lines else lines[-1]


def run_items(chosen: Sequence[Item], count: int, deadline: float) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Each item with its result, as results come, from `count` workers, until the deadline (of `time.monotonic`)."""
    pending, workers = deque(chosen), set[Worker]()
    results: SimpleQueue[tuple[Item, dict[str, Any]]] = SimpleQueue()

    def run_worker() -> None:
        worker = None
        while pending:
            try:
                item = pending.popleft()
            except IndexError:  # another thread took it
                break
            try:
                if worker is None:
                    workers.add(worker := Worker())
            except OSError as error:
                results.put((item, {"state": "crashed", "reason": f"its process could not be started: {error}"}))
                continue
            answer = worker.ask(item)
            if not answer.pop("alive"):
                worker.process.kill()
                workers.discard(worker)
                worker = None
            results.put((item, answer))

    for _ in range(min(count, len(chosen))):
        Thread(target=run_worker, daemon=True).start()
    try:
        for _ in chosen:
            yield results.get(timeout=None if deadline == inf else max(0.0, deadline - time.monotonic()))
    except Empty:
        pass
    finally:
        pending.clear()
        for worker in list(workers):
            worker.process.kill()


def is_left_out(item: Item) -> bool:
    """True if kernels are interpreted here, and the interpreter computes this dtype wrongly."""
    return item.sizes["dtype"] in UNSUPPORTED_DTYPES and uses_triton_kernels(OPS[item.op].impls[item.impl])


def check_items(chosen: Sequence[Item], processes: int, seconds: float, out: Path | None) -> Counter[str]:
    """Check the items, print their results, write them to `out`, and count the states."""
    deadline, stamp = time.monotonic() + seconds, rows.stamp(torch.device(DEVICE))
    counts: Counter[str] = Counter()

    def write(item: Item, answer: Mapping[str, Any]) -> None:
        counts[answer["state"]] += 1
        if out:
            rows.write(out, [{"kind": "correctness", **asdict(item), **answer, **stamp}])

    to_run = []
    for item in chosen:
        if is_left_out(item):
            write(item, {"state": "left out", "reason": "Triton's interpreter computes it wrongly"})
        else:
            to_run.append(item)
    if counts:
        dtypes = ", ".join(UNSUPPORTED_DTYPES)
        print(f"left out: {counts['left out']} items that Triton's interpreter computes wrongly: {dtypes}")
    calls = len(MEMORY_LAYOUTS) * len(to_run)
    estimate = f"{calls} kernels or more, at {COMPILE_SECONDS} s each {calls * COMPILE_SECONDS / processes:.0f} s"
    print(f"{len(to_run)} items in {len(MEMORY_LAYOUTS)} layouts on {processes} processes; if compiled, {estimate}")
    reached, compiled, compiling = [], 0, 0.0
    for item, answer in run_items(to_run, processes, deadline):
        reached.append(item)
        compiled += answer.get("compiled", 0)
        compiling += answer.get("compiling", 0.0)
        line = f"{answer['state']:12}{answer.get('seconds', 0.0):6.1f} s  {item}  {answer['reason']}"
        print(line.rstrip(), flush=True)
        write(item, answer)
    for item in to_run:
        if item not in reached:
            print(f"not reached           {item}")
            write(item, {"state": "not reached", "reason": f"{seconds:.0f} s were over"})
    print(f"compiled {compiled} kernels in {compiling:.1f} s of a process")
    totals = {"right": counts["right"], "wrong": counts["wrong"] + counts["crashed"]}
    totals |= {state: counts[state] for state in ("unsupported", "left out")}
    totals |= {"not reached": counts["not reached"]} if counts["not reached"] else {}
    print(", ".join(f"{count} {state}" for state, count in totals.items()))
    return counts


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--op", action="append", default=[], help="only this op (may be repeated)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only items whose line holds this text")
    parser.add_argument("--processes", type=COUNT, default=os.cpu_count(), help="at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=POSITIVE, default=inf, help="stop then, and say what was not reached")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # be a worker
    args = parser.parse_args(argv)
    if args.work:
        serve_items()
        return 0
    available = all_items(torch.device(DEVICE))
    if unknown := set(args.op) - OPS.keys():
        raise ValueError(f"no op {', '.join(sorted(unknown))}; there are: {', '.join(OPS)}")
    chosen = [x for x in available if x.op in (args.op or OPS) and args.only in str(x)]
    if not chosen:
        raise ValueError(f"no item of {', '.join(args.op or ['any op'])} holds {args.only!r}")
    counts = check_items(chosen, args.processes, args.seconds, args.out)
    none_checked = counts["not reached"] and not counts["right"]  # as on a machine that hangs
    return 1 if counts["wrong"] + counts["crashed"] or none_checked else 0


if __name__ == "__main__":
    sys.exit(main())
