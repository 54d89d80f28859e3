"""Everything a machine with a GPU should run, the most valuable first: `python -m bench.suite --minutes 9 --out DIR`

Correctness of every kernel, then tuning, then int4_matmul beside its peers and its goals, then the model, then the
other ops, then pictures of it all. Every step is a command of this repository with a limit of its own, so one that
hangs costs no more than its share; DIR/summary.txt is written anew after every step, so the suite may be stopped at any
time. `--dry-run` runs every step at toy sizes on a CPU: kernels interpreted, tuning by the cost model.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import rows
from .cases import names

# What int4_matmul is timed beside; those of other libraries only where they are installed.
INT4_BESIDE = ("dense", "dequant", "gemlite", "gemlite_float32", "gptqmodel", "lmdeploy", "autoawq")

# What attention is timed beside; the first are torch's.
PREFILL_BESIDE = ("sdpa_flash", "sdpa_cudnn", "flash_attn", "flashinfer")
DECODE_BESIDE = ("sdpa_flash", "flash_attn", "flashinfer")


@dataclass(frozen=True)
class Step:
    """One command, and the most it may take as a share of all the time."""

    name: str
    share: float
    command: Sequence[str]
    env: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Outcome:
    step: Step
    state: str  # ok | failed | out of time | not reached
    seconds: float
    last: str  # the last line it printed


def plan(out: Path, minutes: float) -> list[Step]:
    """The steps on a GPU. What is tuned is installed, so that the steps after it run by it; prefill comes first, since
    what was tuned last, if time runs out, must not be chosen for more rows than it was timed with.
    """
    measured = str(out / "rows.jsonl")
    model = ["bench.model", "--model", "llama3-vila1.5-8b", "--layers", "4", "--weights", "float16,int4"]
    tuned = [
        Step(f"tune {name}", share, ["bench.tune", *words.split(), "--minutes", f"{share * minutes:.2f}", *keep])
        for keep in (["--install", "--out", str(out)],)
        for name, share, words in (
            ("int4 prefill", 0.05, "int4_matmul --impl prefill dequant --case prefill"),
            ("int4 splitk", 0.05, "int4_matmul --impl splitk --case decode"),
            ("int4 gemv", 0.05, "int4_matmul --impl gemv --case decode"),
            ("decode_attention", 0.05, "decode_attention --case decode"),
            ("prefill_attention", 0.05, "prefill_attention --case whole"),
        )
    ]
    others = [name for name in names() if name != "int4_matmul"]
    int4 = ["bench.ops", "int4_matmul", "--served", "--gate", "case", "--budget", "0.01", "--peers", "--out", measured]
    attention = ["--served", "--peers", "--budget", "0.02", "--out", measured]
    prefill, decode = ([w for name in of for w in ("--impl", name)] for of in (PREFILL_BESIDE, DECODE_BESIDE))
    # gemlite adds up in float16 by atomics, beyond our budget of errors; it is to be beaten all the same.
    beside = [*(word for name in INT4_BESIDE for word in ("--impl", name)), "--ungated", "gemlite"]
    return [
        Step("correctness", 0.25, ["pytest", "-q", "-x", "-m", "gpu", "--maxfail=20"], [("HYPOTHESIS_PROFILE", "dev")]),
        *tuned,
        Step("int4 goals", 0.22, [*int4, "--case", "goals", *beside]),
        Step("goals", 0.03, ["bench.goals", measured]),
        Step("prefill goals", 0.06, ["bench.ops", "prefill_attention", "--case", "whole", *prefill, *attention]),
        Step("decode goals", 0.06, ["bench.ops", "decode_attention", "--case", "decode", *decode, *attention]),
        Step("streaming", 0.08, [*model, "--prompts", "32", "--histories", "16,1024,16384", "--out", measured]),
        Step("int4 errors", 0.04, ["bench.error", "int4_matmul", "--peers", "--out", measured]),
        Step("model", 0.14, [*model, "--out", measured]),
        Step("ops", 0.10, ["bench.ops", *others, "--peers", "--budget", "0.05", "--out", measured]),
        Step("int4 models", 0.12, [*int4, "--case", "models", *beside]),
        Step("all goals", 0.03, ["bench.goals", measured]),
        Step("pictures", 0.05, ["bench.plot", str(out), "--out", str(out / "pictures")]),
    ]


def rehearsal(out: Path) -> list[Step]:
    """The same steps at toy sizes on a CPU."""
    measured = str(out / "rows.jsonl")
    tiny = ["bench.model", "--model", "tiny", "--layers", "1", "--weights", "float32"]
    by_model = ["--timer", "cost-model", "--minutes", "0.15", "--install", "--out", str(out)]
    attention = ["--served", "--impl", "sdpa_flash", "--gate", "case", "--budget", "0.01", "--out", measured]
    beside = ["--impl", "dense", "--impl", "dequant", "--gate", "case", "--budget", "0.01"]
    return [
        Step("correctness", 0.4, ["pytest", "-q", "-x", "tests/test_kernels.py", "-k", "swiglu-triton"]),
        Step("tune swiglu", 0.4, ["bench.tune", "swiglu", "--case", "toy", "--timer", "cost-model", "--out", str(out)]),
        Step("tune int4", 0.4, ["bench.tune", "int4_matmul", "--impl", "dequant", "--case", "toy", *by_model]),
        Step("ops", 0.4, ["bench.ops", "swiglu", "--case", "toy", "--budget", "0.02", "--out", measured]),
        Step("int4", 0.4, ["bench.ops", "int4_matmul", "--case", "toy", "--served", *beside, "--out", measured]),
        Step("prefill", 0.4, ["bench.ops", "prefill_attention", "--case", "toy", *attention]),
        Step("decode", 0.4, ["bench.ops", "decode_attention", "--case", "toy", *attention]),
        Step("streaming", 0.4, [*tiny, "--prompts", "8", "--histories", "16,32", "--contexts", "", "--out", measured]),
        Step("goals", 0.4, ["bench.goals", measured]),
        Step("int4 errors", 0.4, ["bench.error", "int4_matmul", "--toy", "--out", measured]),
        Step("model", 0.4, [*tiny, "--out", measured]),
        Step("pictures", 0.4, ["bench.plot", str(out), "--out", str(out / "pictures")]),
    ]


def run(step: Step, limit: float, log: Path) -> Outcome:
    """Run one step for at most `limit` seconds; what it prints goes to its log."""
    start = time.perf_counter()
    command = [sys.executable, "-m", *step.command]
    with log.open("w") as file:
        file.write(shlex.join(["python", *command[1:]]) + "\n")
        file.flush()
        env = {**os.environ, **dict(step.env), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=rows.ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            state = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            if process.poll() is None:  # and what it started
                os.killpg(process.pid, 9)
                process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step, state, time.perf_counter() - start, lines[-1] if lines else "")


def summary(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One line a step."""
    here = rows.stamp(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield " | ".join(here[key] for key in ("device", "torch", "triton", "commit", "date"))
    for outcome in outcomes:
        yield f"{outcome.state:12}{outcome.seconds:7.1f} s  {outcome.step.name:24}{outcome.last[:120]}"


def run_all(steps: Sequence[Step], minutes: float, out: Path) -> list[Outcome]:
    """Run the steps in order until the time is over; the summary on disk is right after every one of them."""
    end = time.perf_counter() + 60 * minutes
    outcomes = [Outcome(step, "not reached", 0.0, "") for step in steps]
    for i, step in enumerate(steps):
        left = end - time.perf_counter()
        if left > 1:
            limit = min(left, 60 * minutes * step.share)
            print(f"[{i + 1}/{len(steps)}] {step.name}, at most {limit:.0f} s", file=sys.stderr)
            outcomes[i] = run(step, limit, out / "logs" / f"{i + 1}-{step.name.replace(' ', '-')}.log")
        (out / "summary.txt").write_text("\n".join(summary(outcomes)) + "\n")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for rows, tables, logs, pictures, summary.txt"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("bench.suite: torch sees no GPU here; --dry-run rehearses the steps on a CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way ends too
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    steps = rehearsal(args.out) if args.dry_run else plan(args.out, args.minutes)
    outcomes = run_all(steps, args.minutes, args.out.resolve())
    print((args.out / "summary.txt").read_text(), end="")
    return 0 if all(outcome.state == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
