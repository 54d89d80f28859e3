"""Searches the fastest config of a kernel at each size: `python -m bench.tune int4_matmul --case decode --minutes 30`

Candidates are the configs of an implementation and those of its search space (`SearchSpace`, in the kernel's file).
Before anything is launched a candidate is dropped if the cost model (bench/tuner/cost_model.py) predicts --worse-than
times the best prediction, or if, cross-compiled, it spills registers or wants more shared memory than there is. The
others are gated and timed. Without a GPU only the cost model can time Triton kernels: then each candidate is emulated
at small sizes, and its bank conflicts and uncoalesced accesses are added to the predictions, by which it may be dropped
after all. Only candidates that are called best at some sizes are gated, the table says so in the name of its device,
and no call looks it up.

All results are kept in a journal (bench/tuner/journal.py), so that a run that was ended in any way goes on where it
was. Ctrl-C, SIGTERM and the end of --minutes stop it at once, with the table of the best so far. The table goes to
configs/tuned/ if it was timed on a GPU, with --out to that folder, with --install to both; with several implementations
of an op in it, it also says which of them runs at which sizes. The exit code is 1 where nothing was timed. --report
prints the results of journals without searching on, --check lists the entries and choices of tables that no longer
hold.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vila_triton.console import print_progress
from vila_triton.limits import COUNT, POSITIVE, Limits
from vila_triton.registry import OPS, Impl, describe_available, tuned_tables
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.registry.sources import kernel_paths, source_of

from ._tool import kernels_option, tool
from .measure import rows
from .measure.cases import cases, op_names
from .tuner import cost_model, table
from .tuner.cluster import RayCluster
from .tuner.journal import find_journals
from .tuner.search import COST_MODEL, Search, SearchPlan, search_fingerprint
from .tuner.workers import ProcessPool, Workers

JOURNALS = rows.RESULTS / "tune"


def plan_search(impl: Impl, args: argparse.Namespace) -> SearchPlan:
    """Returns the settings of a search. Errors: ValueError if the timer cannot time this here."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    timer = (args.timer or "").replace("-", " ") or (
        "gpu" if has_gpu else COST_MODEL if uses_triton_kernels(impl) else "cpu"
    )
    by_arch = args.arch or not has_gpu
    gpu = (
        cost_model.gpu_of_arch(args.arch or "sm_90")
        if by_arch
        else cost_model.gpu_of_device(torch.cuda.get_device_properties(device))
    )
    if timer == "gpu" and not has_gpu:
        raise ValueError("--timer gpu: torch sees no GPU here")
    if timer == "cpu" and (has_gpu or uses_triton_kernels(impl)):
        raise ValueError(
            f"--timer cpu: {'this machine has a GPU' if has_gpu else f'{impl.name} runs here interpreted'}"
        )
    if timer == COST_MODEL and not (impl.space and impl.space.launch_cost):
        raise ValueError(f"--timer cost-model: {impl.file.name} has no Space with a launch for {impl.name}")
    stamp = rows.stamp(device)
    if timer == COST_MODEL:
        stamp["device"] = f"{gpu.name} ({COST_MODEL})"
    return SearchPlan(timer, stamp["device"], gpu, args.worse_than, args.budget, stamp)


def select_impls(args: argparse.Namespace) -> list[Impl]:
    """Returns the implementations to tune: those named, or all with more than one config. Errors: ValueError naming
    them.
    """
    selected = []
    for op in args.ops or op_names():
        cases(op)  # the op exists
        impls = OPS[op].impls
        if unknown := [name for name in args.impl or () if name not in impls]:
            raise ValueError(f"{op} has no implementation {unknown[0]!r}; there are: {describe_available(impls)}")
        tunable = [impl for impl in impls.values() if impl.space or len(impl.configs) > 1]
        if args.ops and not tunable:
            raise ValueError(f"{op} has nothing to tune: no implementation has a space or more than one config")
        if tunable and OPS[op].sizes_of is None:
            raise ValueError(f"{op} has no sizes (@{op}.sizes_from_args), so nothing could look its table up")
        selected += [impl for impl in tunable if not args.impl or impl.name in args.impl]
    if not selected:
        raise ValueError(f"{', '.join(args.impl)} has one config and no space, so there is nothing to tune")
    return selected


def keep_timeable(impls: list[Impl], args: argparse.Namespace) -> list[Impl]:
    """Returns the implementations that the timer can time here; the others are left out with a note, if they were not
    named.

    Errors: ValueError, that of the first, if none is left or they were named.
    """
    reasons: dict[str, ValueError] = {}
    for impl in impls:
        try:
            plan_search(impl, args)
        except ValueError as reason:
            reasons[f"{impl.op} {impl.name}"] = reason
    if reasons and (args.impl or len(reasons) == len(impls)):
        raise next(iter(reasons.values()))
    for name, reason in reasons.items():
        print(f"{name} is left out: {reason}")
    return [impl for impl in impls if f"{impl.op} {impl.name}" not in reasons]


class Progress:
    """A line on stderr: the progress of the search, and the time it takes at this rate."""

    def __init__(self, search: Search):
        self.search, self.initially_done, self.start, self.last_update = search, search.num_done, time.monotonic(), 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.last_update >= 0.2:
            self.last_update = now
            print_progress(f"{self.search.impl.op} {self.search.impl.name}: {self.line(now - self.start)}")

    def line(self, elapsed: float) -> str:
        done, count = self.search.num_done, len(self.search.candidates)
        counts = {kind: len(entries) for kind, entries in self.search.journal.entries.items()}
        new = done - self.initially_done
        left = format_clock(elapsed / new * (count - done)) if new else "unknown until the first round is through"
        stages = f"compiled {counts['compiled']}, gated {counts['gated']}"
        return f"{done}/{count} candidates done ({stages}), {format_clock(elapsed)} gone, time left: {left}"


def format_clock(seconds: float) -> str:
    """Returns seconds as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def tune_impl(impl: Impl, args: argparse.Namespace, workers: Workers | None, deadline: float) -> bool:
    """Searches on, writes the table and prints the report; without workers from the journal alone. Returns whether
    there are times.
    """
    plan = plan_search(impl, args)
    if plan.gpu.guess:
        print(plan.gpu.guess)
    folder = args.out or JOURNALS
    fingerprint = search_fingerprint(impl, plan)
    for file, recorded in find_journals(folder, impl.op, impl.name).items():
        changed = [key for key in fingerprint if recorded.get(key) != fingerprint[key]]
        if changed and "device" not in changed and "timer" not in changed:
            print(f"stale: {file.name} was made with another {', '.join(changed)}; it is left as it is and not used")
    search = Search(impl, cases(impl.op, args.case), plan, folder, args.candidates)
    already_done = search.num_done
    print(f"{impl.op} {impl.name} on {plan.device}: {len(search.candidates)} candidates, {already_done} done before")
    stopped = ""
    if workers:
        try:
            search.run(workers, deadline, Progress(search))
        except KeyboardInterrupt:
            stopped = "stopped"
        print_progress("")
        if not stopped and search.num_done < len(search.candidates):
            stopped = "out of time"
    if stopped:
        print(f"{stopped} with {search.num_done} of {len(search.candidates)} candidates done: the best so far follow")
    tune_rows = list(search.journal.entries["tune"].values())
    for status, count in Counter(row["status"] for row in tune_rows).items():
        reasons = Counter(row["reason"] for row in tune_rows if row["status"] == status and row["reason"])
        most_frequent = "".join(f"; most often: {reason} ({n})" for reason, n in reasons.most_common(1))
        print(f"  {status:9}{count:6} candidates x sizes{most_frequent}")
    labels = {**fingerprint, "source": source_of(impl)}
    entry = table.build_entry(labels, tune_rows, OPS[impl.op].dynamic_sizes)
    if entry is None:
        print("nothing was timed, so there is no table")
    else:
        table_folder = args.out or (tuned_tables.tables_dir() if plan.timer == "gpu" else JOURNALS)
        with deferred_interrupts():
            file = table.write_table(table_folder, plan.device, entry)
            if args.install and plan.timer == "gpu":
                table.write_table(tuned_tables.tables_dir(), plan.device, entry)
        if plan.timer == COST_MODEL:
            print("The timer is the COST MODEL: nothing was run to take a time, these seconds are predictions.")
            print("Only what is best at some sizes passed the gate; the others are predictions, unchecked.")
        print("\n".join(table.regret_report(tune_rows, impl.configs[0], OPS[impl.op].dynamic_sizes)))
        if impl.op in (choices := tuned_tables.read_table(file)["choices"]):
            print(f"of the implementations tuned, {impl.op} runs: {json.dumps(choices[impl.op])}")
        print(f"table {file}\njournal {search.journal.file}")
    if stopped == "stopped":
        raise KeyboardInterrupt(f"stopped; the same command goes on from {search.journal.file}")
    return entry is not None


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Inside the `with`, Ctrl-C and SIGTERM wait for its end."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


def num_tables(folder: Path) -> int:
    """Returns the number of tables in a folder."""
    return len(list(folder.glob("*.json")))


def stale_entries(folder: Path) -> Iterator[str]:
    """Yields the entries and choices of the tables of a folder that no longer hold, with the reasons."""
    for file in sorted(folder.glob("*.json")):
        tuned_table = tuned_tables.read_table(file)
        if tuned_tables.table_path(tuned_table["device"], folder) != file:
            yield f"{file.name}: was made on {tuned_table['device']}"
        for entry in tuned_table["entries"]:
            impl = OPS[entry["op"]].impls.get(entry["impl"]) if entry["op"] in OPS else None
            missing = tuned_tables.missing_kernels(tuned_table, entry["op"]).get(entry["impl"])
            unknown = f"it is {missing}" if missing else "there is no such implementation"
            reasons = list(tuned_tables.stale_reasons(entry, impl).values()) if impl else [unknown]
            if reasons:
                yield f"{file.name}: {entry['op']} {entry['impl']}: {'; '.join(reasons)}"
        for op in tuned_table["choices"]:
            try:
                tuned_tables.parse_table_choice(tuned_table, op, file)
            except (ValueError, tuned_tables.StaleTableError) as error:
                yield f"{file.name}: {error}"


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line of `python -m bench.tune`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all with something to tune")
    parser.add_argument("--impl", nargs="+", help="only these implementations")
    parser.add_argument("--case", help="a name of configs/bench/OP.toml; default: all")
    parser.add_argument("--timer", choices=("gpu", "cpu", "cost-model"), help="default: what this machine can do")
    parser.add_argument(
        "--arch",
        help=f"compile and predict for it: {', '.join(cost_model.known_archs())}; default: the GPU's, or sm_90",
    )
    parser.add_argument(
        "--worse-than", type=Limits(float, 1, 1e12), default=3.0, metavar="X", help="default: %(default)s"
    )
    parser.add_argument("--budget", type=POSITIVE, default=0.05, help="seconds for each of the two runs of a time")
    parser.add_argument("--candidates", type=COUNT, metavar="N", help="of each implementation, the most promising ones")
    parser.add_argument("--minutes", type=POSITIVE, help="stop after so long, with the best so far")
    parser.add_argument("--workers", type=COUNT, default=os.cpu_count() or 1, help="processes that compile and gate")
    parser.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS", help="a Ray cluster; default: a local one"
    )
    parser.add_argument("--out", type=Path, help="folder of the journals and the table")
    parser.add_argument(
        "--install", action="store_true", help="what a GPU timed, to configs/tuned/ too, where calls look"
    )
    parser.add_argument("--report", action="store_true", help="do not search, only show what the journals say")
    parser.add_argument("--check", action="store_true", help="list entries of tables that no longer hold")
    return parser


@tool
def main() -> int:
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    workers: Workers | None = None
    try:
        impls = select_impls(args)
        if (args.check or args.report) and args.out and not args.out.is_dir():
            raise ValueError(f"--out {args.out}: there is no such folder")
        if args.check:
            stale_lines = list(stale_entries(args.out or tuned_tables.tables_dir()))
            print(
                "\n".join(stale_lines)
                or f"all entries hold, of {num_tables(args.out or tuned_tables.tables_dir())} tables"
            )
            return 1 if stale_lines else 0
        impls = keep_timeable(impls, args)
        if not args.report:
            workers = RayCluster(args.ray, args.workers) if args.ray else ProcessPool(args.workers, kernel_paths())
        timed = False
        for i, impl in enumerate(impls):
            start = time.monotonic()
            timed |= tune_impl(impl, args, workers, start + (end - start) / (len(impls) - i))
        return 0 if timed else 1
    finally:
        if workers:
            workers.close()


if __name__ == "__main__":
    sys.exit(main())
