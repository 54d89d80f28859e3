"""The steps of `bench.suite`, in the order they run, and the time that each may take.

Steps are kept by their priority as long as their minimum fits; the time that remains extends them, by priority again.
So the limits never exceed the total, and the steps that are left out are always the least valuable.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import op_names

# What is timed beside ours: torch's own, and of other libraries what is installed.
INT4_PEERS = ("dense", "dequant", "gemlite", "gemlite_float32", "gptqmodel", "lmdeploy", "autoawq")
PREFILL_PEERS = ("sdpa_flash", "sdpa_cudnn", "flash_attn", "flashinfer")
DECODE_PEERS = ("sdpa_flash", "flash_attn", "flashinfer")
TOY_SECONDS = 15.0  # seconds: the least of every step at toy sizes
MARGIN_SECONDS = 12.0  # seconds of a step's limit in which it starts before, and ends after, it looks at the clock


@dataclass(frozen=True)
class SuiteStep:
    """One command. `priority`: 1 is the most valuable; `min_seconds` is the least worth starting with, `max_seconds`
    the most it can use. {seconds} and {minutes} in `argv` stand for the time that the command itself is told to take.
    """

    name: str
    priority: int
    min_seconds: float
    max_seconds: float
    argv: Sequence[str]

    @property
    def has_own_clock(self) -> bool:
        """True if the command ends by a clock of its own."""
        return any(word in ("{seconds}", "{minutes}") for word in self.argv)

    def command(self, limit: float) -> list[str]:
        """Returns the command line for a limit in seconds."""
        own = max(1.0, limit - MARGIN_SECONDS)
        clocks = {"{seconds}": f"{own:.0f}", "{minutes}": f"{own / 60:.2f}"}
        return [clocks.get(word, word) for word in self.argv]


def allot_seconds(steps: Sequence[SuiteStep], seconds: float) -> dict[str, float]:
    """Returns the limit of each step that is kept, by its name."""
    limits: dict[str, float] = {}
    remaining = seconds
    ranked = sorted(steps, key=lambda step: step.priority)
    for step in ranked:
        if step.min_seconds > remaining:
            break
        limits[step.name] = step.min_seconds
        remaining -= step.min_seconds
    for step in ranked[: len(limits)]:
        extra = min(remaining, step.max_seconds - step.min_seconds)
        limits[step.name] += extra
        remaining -= extra
    return limits


def left_out_lines(steps: Sequence[SuiteStep], seconds: float) -> Iterator[str]:
    """Yields a line with the reason for each step that is left out."""
    limits = allot_seconds(steps, seconds)
    needed = sum(step.min_seconds for step in steps if step.name in limits)
    for step in sorted(steps, key=lambda step: step.priority):
        if step.name not in limits:
            yield (
                f"{step.name}: left out, it needs {step.min_seconds:.0f} s, and of {seconds:.0f} s those that are more "
                f"valuable leave {max(0.0, seconds - needed):.0f}"
            )
            needed += step.min_seconds


def repeat_flag(flag: str, values: Sequence[str]) -> list[str]:
    """Returns the flag before each of the values."""
    return [word for value in values for word in (flag, value)]


def suite_steps(out: Path, toy: bool) -> list[SuiteStep]:
    """Returns the steps, whose rows, tables and plots go to `out`. `toy`: the same at sizes that a CPU can do, all of
    which fit into five minutes.
    """
    rows_file = str(out / "rows.jsonl")

    def by_size(real: str, small: str) -> list[str]:
        return (small if toy else real).split()

    def step(name: str, priority: int, min_seconds: float, max_seconds: float, *argv: str | Sequence[str]) -> SuiteStep:
        flat = [word for part in argv for word in ([part] if isinstance(part, str) else part)]
        return SuiteStep(name, priority, TOY_SECONDS if toy else min_seconds, max_seconds, flat)

    common_flags = ["--default", "--gate", "case", "--peers", "--budget", "0.01", "--out", rows_file]
    # gemlite adds up in float16 by atomics, beyond our budget of errors; it is to be beaten all the same.
    int4 = ["bench.ops", "int4_matmul", *repeat_flag("--impl", INT4_PEERS), "--skip-gate", "gemlite", *common_flags]
    prefill = ["bench.ops", "prefill_attention", *repeat_flag("--impl", PREFILL_PEERS), *common_flags]
    decode = ["bench.ops", "decode_attention", *repeat_flag("--impl", DECODE_PEERS), *common_flags]
    model = ["bench.model", "--out", rows_file]
    model += by_size(
        "--model llama3-vila1.5-8b --layers 4 --weights float16,int4 --prompts 128,2048 --contexts 128,2048 "
        "--histories 16,1024,8160",  # the last with its question is as long as the model was made for
        "--model tiny --layers 1 --weights float32 --prompts 16 --contexts 32 --histories 16,32",
    )
    tune = ["bench.tune", "--budget", "0.01", "--minutes", "{minutes}", "--out", str(out)]
    tune += by_size("--candidates 8", "--candidates 1 --workers 1 --case toy")
    int4_tune, triton = [*tune, "int4_matmul", "--impl"], ["--impl", "triton"]
    errors = ["bench.accuracy", "int4_matmul", "--peers", "--out", rows_file]
    plot_flags = ["--only", "roofline,time,speedup,model"]
    other_ops = [name for name in op_names() if name not in ("int4_matmul", "prefill_attention", "decode_attention")]
    other_ops_command = [
        "bench.ops",
        *by_size(f"{' '.join(other_ops)} --budget 0.05", "swiglu --case toy --budget 0.01"),
    ]
    correctness_command = [
        "bench.correctness",
        "--processes",
        str(os.cpu_count()),
        "--seconds",
        "{seconds}",
        "--out",
        rows_file,
    ]
    correctness_command += by_size("", "--op swiglu")
    return [
        step("correctness", 1, 80, 165, correctness_command),
        step("int4 goals", 2, 65, 120, int4, "--case", by_size("goals", "toy")),
        step("prefill goals", 3, 15, 45, prefill, "--case", by_size("whole", "toy")),
        step("decode goals", 4, 20, 45, decode, "--case", by_size("decode", "toy")),
        step("goals", 5, 10, 20, "bench.goals", rows_file),
        step("model", 7, 70, 120, model),
        step("tune int4 decode", 9, 116, 150, int4_tune, by_size("gemv splitk --case decode", "splitk")),
        step("tune int4 prefill", 10, 85, 120, int4_tune, by_size("prefill --case prefill", "prefill")),
        step("tune decode attention", 11, 73, 120, tune, "decode_attention", triton, by_size("--case decode", "")),
        step("tune prefill attention", 12, 73, 120, tune, "prefill_attention", triton, by_size("--case whole", "")),
        step("int4 models", 13, 120, 240, int4, "--case", by_size("models", "toy")),
        step("other ops", 14, 400, 600, other_ops_command, "--peers", "--out", rows_file),
        step("int4 errors", 15, 65, 120, errors, by_size("", "--toy")),
        step("plots", 8, 22, 60, "bench.plot", str(out), plot_flags, "--out", str(out / "plots")),
        step("report", 6, 22, 60, "bench.report", str(out), "--out", str(out / "report.html")),
    ]
