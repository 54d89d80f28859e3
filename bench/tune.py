"""Which config of a kernel is fastest at which sizes? `python -m bench.tune int4_matmul --case decode --minutes 30`

Candidates are the configs of an implementation and those of its search space (`Space`, in the kernel's file). Before
anything is launched one is dropped if the cost model (bench/tuner/cost_model.py) says it takes --worse-than times as
long as the best, or if, cross-compiled, it spills registers or wants more shared memory than there is. What is left passes the
gate and is timed. Without a GPU there is nothing to time Triton kernels with but the cost model itself: then only those
that it calls best at some sizes pass the gate, and the table says so in the name of its device; no call looks it up.

All that is found is kept in a journal (bench/tuner/journal.py), so that a run that was ended in any way goes on where
it was. Ctrl-C, SIGTERM and the end of --minutes stop it in the middle of what it does, with the table of the best so
far. The table goes to configs/tuned/ if it was timed on a GPU, with --out to that folder, with --install to both;
with several implementations of an op in it, it also says which of them runs at which sizes. The exit code is 1 where
nothing was timed. --report prints what
journals say without searching on, --check the entries and choices of tables that no longer hold.
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

from vila_triton.console import bar
from vila_triton.limits import COUNT, POSITIVE, Limits
from vila_triton.registry import OPS, Impl, there, tuned_tables
from vila_triton.registry.interpreter import holds_kernels

from ._tool import tool
from .measure import rows
from .measure.cases import cases, names
from .tuner import cost_model, table
from .tuner.cluster import Cluster
from .tuner.journal import searches
from .tuner.search import COST_MODEL, Plan, Search, identity
from .tuner.workers import Processes, Workers

JOURNALS = rows.RESULTS / "tune"


def plan_for(impl: Impl, args: argparse.Namespace) -> Plan:
    """How to search. Errors: ValueError if the timer cannot time this here."""
    here = torch.cuda.is_available()
    device = torch.device("cuda" if here else "cpu")
    timer = (args.timer or "").replace("-", " ") or ("gpu" if here else COST_MODEL if holds_kernels(impl) else "cpu")
    of_arch = args.arch or not here
    gpu = cost_model.gpu(args.arch or "sm_90") if of_arch else cost_model.here(torch.cuda.get_device_properties(device))
    if timer == "gpu" and not here:
        raise ValueError("--timer gpu: torch sees no GPU here")
    if timer == "cpu" and (here or holds_kernels(impl)):
        raise ValueError(f"--timer cpu: {'this machine has a GPU' if here else f'{impl.name} runs here interpreted'}")
    if timer == COST_MODEL and not (impl.space and impl.space.launch):
        raise ValueError(f"--timer cost-model: {impl.file.name} has no Space with a launch for {impl.name}")
    stamp = rows.stamp(device)
    if timer == COST_MODEL:
        stamp["device"] = f"{gpu.name} ({COST_MODEL})"
    return Plan(timer, stamp["device"], gpu, args.worse_than, args.budget, stamp)


def chosen(args: argparse.Namespace) -> list[Impl]:
    """The implementations to tune: those named, or all with more than one config. Errors: ValueError naming them."""
    found = []
    for op in args.ops or names():
        cases(op)  # the op exists
        impls = OPS[op].impls
        if unknown := [name for name in args.impl or () if name not in impls]:
            raise ValueError(f"{op} has no implementation {unknown[0]!r}; there are: {there(impls)}")
        tunable = [impl for impl in impls.values() if impl.space or len(impl.configs) > 1]
        if args.ops and not tunable:
            raise ValueError(f"{op} has nothing to tune: no implementation has a space or more than one config")
        if tunable and OPS[op].sizes_of is None:
            raise ValueError(f"{op} has no sizes (@{op}.sizes), so nothing could look its table up")
        found += [impl for impl in tunable if not args.impl or impl.name in args.impl]
    if not found:
        raise ValueError(f"{', '.join(args.impl)} has one config and no space, so there is nothing to tune")
    return found


def timeable(found: list[Impl], args: argparse.Namespace) -> list[Impl]:
    """Those that the timer asked for can time here; the others are left out with a word, if they were not named.

    Errors: ValueError, that of the first, if none is left or they were named.
    """
    reasons: dict[str, ValueError] = {}
    for impl in found:
        try:
            plan_for(impl, args)
        except ValueError as reason:
            reasons[f"{impl.op} {impl.name}"] = reason
    if reasons and (args.impl or len(reasons) == len(found)):
        raise next(iter(reasons.values()))
    for name, reason in reasons.items():
        print(f"{name} is left out: {reason}")
    return [impl for impl in found if f"{impl.op} {impl.name}" not in reasons]


class Progress:
    """A line on standard error: how far the search is, and how long the rest takes if it goes on at this rate."""

    def __init__(self, search: Search):
        self.search, self.before, self.start, self.last = search, search.done, time.monotonic(), 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.last >= 0.2:
            self.last = now
            bar(f"{self.search.impl.op} {self.search.impl.name}: {self.line(now - self.start)}")

    def line(self, gone: float) -> str:
        done, count = self.search.done, len(self.search.candidates)
        found = {kind: len(known) for kind, known in self.search.journal.found.items()}
        new = done - self.before
        left = clock(gone / new * (count - done)) if new else "unknown until the first round is through"
        held = f"compiled {found['compiled']}, gated {found['gated']}"
        return f"{done}/{count} candidates done ({held}), {clock(gone)} gone, time left: {left}"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def tune(impl: Impl, args: argparse.Namespace, workers: Workers | None, deadline: float) -> bool:
    """Search on, write the table, print the report; without workers from the journal. Whether there are times."""
    plan = plan_for(impl, args)
    if plan.gpu.guessed:
        print(plan.gpu.guessed)
    folder = args.out or JOURNALS
    now = identity(impl, plan)
    for file, then in searches(folder, impl.op, impl.name).items():
        changed = [key for key in now if then.get(key) != now[key]]
        if changed and "device" not in changed and "timer" not in changed:
            print(f"stale: {file.name} was made with another {', '.join(changed)}; it is left as it is and not used")
    search = Search(impl, cases(impl.op, args.case), plan, folder, args.candidates)
    before = search.done
    print(f"{impl.op} {impl.name} on {plan.device}: {len(search.candidates)} candidates, {before} done before")
    stopped = ""
    if workers:
        try:
            search.run(workers, deadline, Progress(search))
        except KeyboardInterrupt:
            stopped = "stopped"
        bar("")
        if not stopped and search.done < len(search.candidates):
            stopped = "out of time"
    if stopped:
        print(f"{stopped} with {search.done} of {len(search.candidates)} candidates done: the best so far follow")
    rows_found = list(search.journal.found["tune"].values())
    for status, count in Counter(row["status"] for row in rows_found).items():
        reasons = Counter(row["reason"] for row in rows_found if row["status"] == status and row["reason"])
        often = "".join(f"; most often: {reason} ({n})" for reason, n in reasons.most_common(1))
        print(f"  {status:9}{count:6} candidates x sizes{often}")
    entry = table.entry(now, rows_found, OPS[impl.op].varying)
    if entry is None:
        print("nothing was timed, so there is no table")
    else:
        where = args.out or (tuned_tables.folder() if plan.timer == "gpu" else JOURNALS)
        with undisturbed():
            file = table.write(where, plan.device, entry)
            if args.install and plan.timer == "gpu":
                table.write(tuned_tables.folder(), plan.device, entry)
        if plan.timer == COST_MODEL:
            print("The timer is the COST MODEL: nothing was run to take a time, these seconds are predictions.")
            print("Only what is best at some sizes passed the gate; the others are predictions, unchecked.")
        print("\n".join(table.report(rows_found, impl.configs[0], OPS[impl.op].varying)))
        if impl.op in (found := tuned_tables.read(file)["choices"]):
            print(f"of the implementations tuned, {impl.op} runs: {json.dumps(found[impl.op])}")
        print(f"table {file}\njournal {search.journal.file}")
    if stopped == "stopped":
        raise KeyboardInterrupt(f"stopped; the same command goes on from {search.journal.file}")
    return entry is not None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of what is inside."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def tables(folder: Path) -> int:
    return len(list(folder.glob("*.json")))


def stale(folder: Path) -> Iterator[str]:
    """The entries and choices of the tables of a folder that do not hold, and why."""
    for file in sorted(folder.glob("*.json")):
        held = tuned_tables.read(file)
        if tuned_tables.file_of(held["device"], folder) != file:
            yield f"{file.name}: was made on {held['device']}"
        for entry in held["entries"]:
            impl = OPS[entry["op"]].impls.get(entry["impl"]) if entry["op"] in OPS else None
            why = list(tuned_tables.changes(entry, impl).values()) if impl else ["there is no such implementation"]
            if why:
                yield f"{file.name}: {entry['op']} {entry['impl']}: {'; '.join(why)}"
        for op in held["choices"]:
            try:
                tuned_tables.parsed(held, op, file)
            except (ValueError, tuned_tables.Stale) as error:
                yield f"{file.name}: {error}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all with something to tune")
    parser.add_argument("--impl", nargs="+", help="only these implementations")
    parser.add_argument("--case", help="a name of configs/bench/OP.toml; default: all")
    parser.add_argument("--timer", choices=("gpu", "cpu", "cost-model"), help="default: what this machine can do")
    parser.add_argument(
        "--arch", help=f"compile and predict for it: {', '.join(cost_model.archs())}; default: the GPU's, or sm_90"
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
        known = chosen(args)
        if (args.check or args.report) and args.out and not args.out.is_dir():
            raise ValueError(f"--out {args.out}: there is no such folder")
        if args.check:
            found = list(stale(args.out or tuned_tables.folder()))
            print("\n".join(found) or f"all entries hold, of {tables(args.out or tuned_tables.folder())} tables")
            return 1 if found else 0
        known = timeable(known, args)
        if not args.report:
            workers = Cluster(args.ray, args.workers) if args.ray else Processes(args.workers)
        timed = False
        for i, impl in enumerate(known):
            now = time.monotonic()
            timed |= tune(impl, args, workers, now + (end - now) / (len(known) - i))
        return 0 if timed else 1
    finally:
        if workers:
            workers.close()


if __name__ == "__main__":
    sys.exit(main())
