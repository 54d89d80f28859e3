"""Run all checks and measurements of a GPU in one go: `python -m bench.suite --minutes 12 --out DIR`

The steps are the correctness of every kernel, int4_matmul and attention beside their peers and goals, the model, a few
candidates of each search, plots and a report (bench/measure/suite_plan.py). Every step is a command of this repository
with a time limit: at its end the step is asked to stop, and GRACE_SECONDS later it is killed with all its children.
Time that a step does not use goes to the later ones; steps that do not fit are left out, the least valuable first.
DIR/summary.txt is written anew after every step, so the suite may be stopped at any time.

`--estimate` runs nothing and prints the time that each step would take. `--dry-run` runs every step at toy sizes, on a
CPU if there is no GPU; `--stand-in` runs them on the stand-in for a GPU (`bench.standin`).
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vila_triton.limits import POSITIVE

from . import standin
from ._tool import tool
from .goals import report_all_goals
from .measure import rows
from .measure.suite_plan import SuiteStep, allot_seconds, left_out_lines, suite_steps

GRACE_SECONDS = 5.0  # seconds from being asked to stop to being killed
PYTHON_COMMAND = standin.command_prefix()  # what starts a step
OWN_SECONDS = 12.0  # seconds in which the suite itself starts, and sums up


@dataclass(frozen=True)
class Outcome:
    step: SuiteStep
    state: str  # ok | failed | out of time | left out | stopped | not reached
    seconds: float
    last_line: str  # the last line it printed

    @property
    def row_fields(self) -> dict[str, str | float]:
        """The fields of its row."""
        return {"step": self.step.name, "state": self.state, "seconds": self.seconds, "last": self.last_line}


def run_step(step: SuiteStep, limit: float, log: Path) -> Outcome:
    """Run one step for at most `limit` seconds; what it prints goes to its log."""
    start = time.perf_counter()
    argv = step.command(limit)
    grace = min(GRACE_SECONDS, limit / 4)
    with log.open("w") as file:
        file.write(shlex.join(["python", "-m", *argv]) + "\n")
        file.flush()
        process = subprocess.Popen(
            [*PYTHON_COMMAND, *argv],
            cwd=rows.CHILD_FOLDER,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            state = "ok" if process.wait(limit - grace) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            stop_process(process, grace)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step, state, time.perf_counter() - start, lines[-1] if lines else "")


def stop_process(process: subprocess.Popen, grace: float) -> None:
    """Ask a process to stop if it still runs, and kill what is left of its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def device() -> torch.device:
    """Returns the current GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def summary_lines(outcomes: Sequence[Outcome], measured: Path) -> Iterator[str]:
    """The summary: device and versions, one line a step, the counts of right kernels, and the goals."""
    stamp = rows.stamp(device())
    yield " | ".join([stamp["device"], *(f"{k} {stamp[k]}" for k in ("torch", "triton", "python", "commit", "date"))])
    for outcome in outcomes:
        yield f"{outcome.state:12}{outcome.seconds:7.1f} s  {outcome.step.name:24}{outcome.last_line[:120]}"
    results = list(rows.read(measured)) if measured.exists() else []
    if states := Counter(row["state"] for row in results if row["kind"] == "correctness"):
        yield "correctness: " + ", ".join(f"{count} {state}" for state, count in states.items())
    if reasons := Counter(row["reason"] for row in results if row["kind"] == "refused"):
        reason, frequency = reasons.most_common(1)[0]
        yield f"no time: {reasons.total()}; most often, {frequency} times: {reason[:120]}"
    yield from report_all_goals(results)


def run_plan(plan: Sequence[SuiteStep], seconds: float, out: Path) -> list[Outcome]:
    """Run the steps in order until the time is over. The summary on disk is written anew after every step."""
    end, measured = time.perf_counter() + seconds, out / "rows.jsonl"
    outcomes = [Outcome(step, "not reached", 0.0, "") for step in plan]
    for i, step in enumerate(plan):
        remaining = end - time.perf_counter()
        limit = allot_seconds(plan[i:], remaining).get(step.name)
        try:
            if limit is None:
                reason = next(line for line in left_out_lines(plan[i:], remaining) if line.startswith(f"{step.name}: "))
                outcomes[i] = Outcome(step, "left out", 0.0, reason)
            else:
                outcomes[i] = Outcome(step, "stopped", 0.0, "")
                print(f"[{i + 1}/{len(plan)}] {step.name}, at most {limit:.0f} s", file=sys.stderr)
                outcomes[i] = run_step(step, limit, out / "logs" / f"{i + 1}-{step.name.replace(' ', '-')}.log")
            rows.write(measured, [{"kind": "step", **outcomes[i].row_fields, **rows.stamp(device())}])
        finally:
            (out / "summary.new").write_text("\n".join(summary_lines(outcomes, measured)) + "\n")
            (out / "summary.new").replace(out / "summary.txt")
    return outcomes


@tool
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=POSITIVE, default=12)
    parser.add_argument("--out", type=Path, help="a folder for rows, tables, logs, plots, report.html, summary.txt")
    parser.add_argument("--estimate", action="store_true", help="print the time that each step would take on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU where there is no GPU")
    parser.add_argument("--stand-in", action="store_true", help="toy sizes, on the stand-in for a GPU")
    args = parser.parse_args()
    if args.stand_in and not standin.is_active():
        os.execv(sys.executable, [sys.executable, "-m", "bench.standin", "bench.suite", *sys.argv[1:]])
    toy = args.dry_run or args.stand_in
    seconds = 60 * args.minutes - OWN_SECONDS
    plan = suite_steps((args.out or Path("out")).resolve(), toy)
    if args.estimate:
        from ._suite_estimate import estimate_table

        print(*estimate_table(plan, seconds), *left_out_lines(plan, seconds), sep="\n")
        return 0
    if args.out is None:
        parser.error("--out: expected a folder for the results")
    if not toy and not torch.cuda.is_available():
        print("bench.suite: torch sees no GPU here; --dry-run rehearses the steps on a CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way ends too
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    print(*left_out_lines(plan, seconds), sep="\n", file=sys.stderr)
    outcomes = run_plan(plan, seconds, args.out.resolve())
    print((args.out / "summary.txt").read_text(), end="")
    return 0 if all(outcome.state in ("ok", "left out") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
