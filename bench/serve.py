"""Times servers of a model under a seeded trace of requests: `python -m bench.serve --vllm PYTHON --out ROWS.jsonl`

It starts `vila-triton serve` and vLLM with its own kernels on the same model, and asks both, and our engine without a
server, the same: conversations about one to three images, of which many come again, with short and long answers that
are known (configs/bench/serve.toml has the shares). Requests come

    streams     so many at any time, the next as soon as one has ended
    arrivals    at the random times of a Poisson process, however many wait (`--rates`)

In a round all are asked one after the other, each time what none was asked before, so that other load on the machine
and caches meet all alike; a ratio is the median over rounds of the ratio within a round. Who gets fewer answers right
than our engine, by more than a few, gets no time. The client works on the same cores: `client` says how many it took,
`others` how many went to what has nothing to do with this.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vila_triton.arguments import DTYPES, parse_kernel_settings
from vila_triton.console import print_progress
from vila_triton.device import pick_device
from vila_triton.limits import COUNT, POSITIVE, SEED, Limits
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import validate_choices
from vila_triton.registry.sources import kernel_paths

from ._tool import kernels_option, tool
from .measure import rows
from .serving.client import Load, Outcome, Server, ask_all, kernels_that_ran, served_model
from .serving.engine_process import running_engine
from .serving.latency import Run, differing, figures, format_ratios, ratios, right_share, wrong_answers
from .serving.other_load import OtherLoad
from .serving.servers import OURS, VLLM, free_port, own_kernel_options, running, server_command, server_environment
from .serving.trace import Segment, serve_config

ENGINE = "engine"
NAMES = ("vllm", "engine")  # of peers on the command line
PEERS = {VLLM: "ratio_vllm", ENGINE: "ratio_engine"}  # and the field of a row with ratios to it
GATE_LOAD, GATE_SEGMENT, GATE_REQUESTS = Load(streams=4), 0, 100
SHARE = Limits(float, 0, 1)


def peer_names(text: str) -> list[str]:
    """Parse the names of peers, with commas between them. Errors: ArgumentTypeError for others than there are."""
    names = text.split(",") if text else []
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"no peer {unknown[0]!r}; there are: {', '.join(NAMES)}")
    return names


@dataclass(frozen=True)
class Target:
    """Something that answers requests: a server, or our engine, which has no `url`."""

    name: str
    ask: Callable[[Segment, Load], list[Outcome]]
    url: str | None = None

    def run(self, segment: Segment, load: Load, sessions: Sequence[int]) -> Run:
        """Answers the requests of a segment under a load. What this process works is the client's."""
        others, begin = OtherLoad(sessions), time.process_time()
        outcomes = self.ask(segment, load)
        client_seconds = time.process_time() - begin
        return Run(outcomes, client_seconds, max(0.0, others.seconds() - client_seconds))


def ask_server(server: Server, segment: Segment, load: Load) -> list[Outcome]:
    """Asks a server, in an event loop of its own."""
    return asyncio.run(ask_all(server, segment.requests, load))


class Comparison:
    """Targets that are asked the same requests, and the rows of what came of it."""

    def __init__(self, args: argparse.Namespace, closing: contextlib.ExitStack):
        self.args, self.closing = args, closing
        self.limits = serve_config()[1]
        self.device = pick_device(args.device)
        self.stamp = rows.stamp(self.device)
        self.environment = server_environment(args.vllm)
        if args.set and self.device.type == "cpu":
            self.environment = {**self.environment, "TRITON_INTERPRET": "1"}
        self.labels: dict[str, Any] = {"model": "/".join(args.model.resolve().parts[-2:])}
        self.targets: list[Target] = []
        self.sessions: list[int] = []
        self.num_refused = 0

    @property
    def settings(self) -> list[str]:
        """The options that choose kernels, for processes."""
        paths = [word for path in kernel_paths() for word in ("--kernels", path)]
        return paths + [word for setting in self.args.set for word in ("--set", setting)]

    def add_engine(self) -> None:
        """Starts our engine."""
        args = self.args
        options = ["--model", str(args.model.resolve()), "--dtype", args.dtype, "--device", str(self.device)]
        print_progress(f"starting {ENGINE}", is_last=True)
        engine = self.closing.enter_context(running_engine(args.vllm, [*options, *self.settings], self.environment))
        self.sessions.append(engine.process.pid)
        self.targets.append(Target(ENGINE, engine.ask))

    def add_server(self, name: str) -> None:
        """Starts a server; one that does not start is refused."""
        args, url = self.args, f"http://127.0.0.1:{free_port()}"
        settings, own = self.settings, list[str]()
        if name == VLLM:
            settings, own = [], own_kernel_options(args.model, self.device.type)
        command = server_command(args.vllm, args.model.resolve(), url, args.dtype, settings, own)
        print_progress(f"starting {name}", is_last=True)
        try:
            served = self.closing.enter_context(running(command, self.environment, url, self.limits.start_seconds))
        except (OSError, RuntimeError) as error:
            self.refuse(name, "start", str(error))
            return
        self.sessions.append(served.session)
        self.add_url(name, url, served.model)

    def add_url(self, name: str, url: str, model: str | None = None) -> None:
        """Adds a server that runs already."""
        server = Server(url, model or served_model(url), self.limits.answer_tokens, self.limits.request_seconds)
        self.targets.append(Target(name, partial(ask_server, server), url))

    def refuse(self, name: str, what: str, reason: str, **labels: Any) -> None:
        """Says that a target gets no time, and why."""
        self.num_refused += 1
        print(f"  {name}: no time, {reason}", flush=True)
        self.write({"kind": "refused", "what": what, **self.labels, "choice": name, **labels, "reason": reason})

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row to the file of --out."""
        if self.args.out:
            rows.write(self.args.out, [{**row, "dtype": self.args.dtype, **self.stamp}])

    def least_right(self, engine_runs: Sequence[Run]) -> float:
        """Returns the share of right answers that a target must have: about that of our engine, if it was asked."""
        least = self.limits.right if self.args.right is None else self.args.right
        return max(least, right_share(engine_runs) - self.limits.fewer) if engine_runs and least else least

    def gate(self) -> None:
        """Leaves only targets whose answers are right, in a segment that is not timed and warms them up."""
        segment, runs = Segment(self.args.trace_seed, GATE_SEGMENT, GATE_REQUESTS), dict[str, list[Run]]()
        for target in self.targets:
            print_progress(f"asking {target.name}, not timed")
            runs[target.name] = [target.run(segment, GATE_LOAD, self.sessions)]
        print_progress("")
        for name, mine in runs.items():
            if reason := wrong_answers(mine, self.least_right(runs.get(ENGINE, []))):
                self.refuse(name, "answers", reason)
                self.targets = [target for target in self.targets if target.name != name]

    def time_load(self, load: Load, first_segment: int) -> Iterator[dict[str, Any]]:
        """Yields the row of every target under a load."""
        runs: dict[str, list[Run]] = {target.name: [] for target in self.targets}
        for i in range(self.args.rounds):
            segment = Segment(self.args.trace_seed, first_segment + i, self.args.requests)
            _ = segment.requests  # made before the clock runs
            turn = i % len(self.targets)
            for target in (*self.targets[turn:], *self.targets[:turn]):
                print_progress(f"{load}: round {i + 1} of {self.args.rounds}, {target.name}")
                runs[target.name].append(target.run(segment, load, self.sessions))
        print_progress("")
        for target in self.targets:
            name, mine = target.name, runs[target.name]
            labels = {**load.labels, **self.labels, "choice": name, "trace_seed": self.args.trace_seed}
            if reason := wrong_answers(mine, self.least_right(runs.get(ENGINE, []))):
                yield {"kind": "refused", **labels, "reason": reason}
                continue
            row = {"kind": "serve", **labels, "rounds": self.args.rounds, **figures(mine)}
            row |= {field: ratios(mine, runs[peer]) for peer, field in PEERS.items() if peer in runs}
            if target.url:
                row["kernels"] = kernels_that_ran(target.url)
            if ENGINE in runs:
                row["differing"] = differing(mine, runs[ENGINE])
            yield row


COLUMNS = {  # title: field, what it is shown in
    "TTFT ms": ("ttft", 1e3),
    "p95": ("ttft_p95", 1e3),
    "TPOT ms": ("tpot", 1e3),
    "p95 ": ("tpot_p95", 1e3),
    "whole ms": ("latency", 1e3),
    "tokens/s": ("tokens_per_s", 1),
    "requests/s": ("requests_per_s", 1),
    "client": ("client_cores", 1),
    "others": ("other_cores", 1),
}
RATIO_HEADS = "".join(f"{f'x {name}: TTFT  TPOT  tokens/s':>36}" for name in ("vllm", "engine"))
HEAD = f"{'':18}{''.join(f'{title:>11}' for title in COLUMNS)}{'right':>8}{'errors':>8}{RATIO_HEADS}"


def format_row(row: Mapping[str, Any]) -> str:
    """Returns one line of the table."""
    label = f"  {row['choice']:16.16}"
    if row["kind"] == "refused":
        return f"{label}  no time: {row['reason']}"
    numbers = "".join(f"{row[f] * scale:11.2f}" if f in row else f"{'-':>11}" for f, scale in COLUMNS.values())
    ratio = "".join(f"{format_ratios(row[field]) if field in row else '':>36}" for field in PEERS.values())
    return f"{label}{numbers}{row['right']:8.1%}{row['errors']:8}{ratio}".rstrip()


def compare(args: argparse.Namespace, closing: contextlib.ExitStack) -> int:
    """Starts, checks, times, prints and writes; returns 1 if something got no time."""
    validate_choices(parse_kernel_settings(args.set))
    comparison = Comparison(args, closing)
    load_average = os.getloadavg()[0]
    print(f"{comparison.labels['model']}, {args.dtype}, {comparison.stamp['device']}, load average {load_average:.1f}")
    if load_average > 0.5:
        print("other processes work on this machine: times mean less")
    if args.url:
        comparison.add_url(args.url, args.url)
    else:
        comparison.add_server(OURS)
        if "vllm" in args.peers:
            comparison.add_server(VLLM)
    if "engine" in args.peers:
        comparison.add_engine()
    comparison.gate()
    print(HEAD)
    loads = [*(Load(streams=n) for n in args.streams), *(Load(rate=rate) for rate in args.rates)]
    for i, load in enumerate(loads if comparison.targets else ()):
        print(f"\n{load}, {args.rounds} x {args.requests} requests")
        for row in comparison.time_load(load, GATE_SEGMENT + 1 + i * args.rounds):
            comparison.num_refused += row["kind"] == "refused"
            print(format_row(row), flush=True)
            comparison.write(row)
    return int(comparison.num_refused > 0)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line of `python -m bench.serve`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT, metavar="FOLDER", help="(the bundled one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    help_text = "the Python of an environment with vLLM and this package, which runs the servers (this one)"
    parser.add_argument("--vllm", type=Path, default=Path(sys.executable), metavar="PYTHON", help=help_text)
    parser.add_argument("--url", help="time the server that answers there, and start none")
    help_text = "what is timed beside it, with commas: vllm, with its own kernels; engine, ours without a server (both)"
    parser.add_argument("--peers", type=peer_names, default=[*NAMES], help=help_text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="kernels.OP=NAME", help="for our server and our engine"
    )
    parser.add_argument("--streams", type=comma_list(COUNT), default=[1, 2, 4, 8, 16], help="with commas (1,2,4,8,16)")
    parser.add_argument("--rates", type=comma_list(POSITIVE), default=[], help="requests a second, with commas (none)")
    parser.add_argument("--requests", type=COUNT, default=64, help="of a round (64)")
    parser.add_argument("--rounds", type=COUNT, default=3, help="(3)")
    parser.add_argument("--trace-seed", type=SEED, default=0, help="of the requests (0)")
    help_text = "the least share of right answers, 0 for a model that does not know such questions"
    parser.add_argument("--right", type=SHARE, help=help_text)
    parser.add_argument("--device", help="of our engine, cpu or cuda; vLLM runs where it was built for")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    return parser


def comma_list(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns a `type=` for numbers with commas; an empty text is an empty list."""
    return lambda text: [read(part) for part in text.split(",") if part]


@tool
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with contextlib.ExitStack() as closing:  # ends the servers
        return compare(args, closing)


if __name__ == "__main__":
    sys.exit(main())
