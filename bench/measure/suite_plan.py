"""What `bench.suite` does: its steps, in the order they run, and how much of the time each may take.

Steps are kept by their priority, as long as the least each needs fits; what is left of the time tops them up by their
priority. So the limits never add up to more than there is, and what is left out is always the least valuable.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import names

# What is timed beside ours: torch's own, and of other libraries what is installed.
INT4_BESIDE = ("dense", "dequant", "gemlite", "gemlite_float32", "gptqmodel", "lmdeploy", "autoawq")
PREFILL_BESIDE = ("sdpa_flash", "sdpa_cudnn", "flash_attn", "flashinfer")
DECODE_BESIDE = ("sdpa_flash", "flash_attn", "flashinfer")
TOY = 15.0  # seconds: the least of every step at toy sizes
MARGIN = 12.0  # seconds of a step's limit in which it starts before, and ends after, it looks at the clock


@dataclass(frozen=True)
class Step:
    """One command. `priority`: 1 is the most valuable; `least` and `most`: seconds it is worth starting with, and can
    use. The words {seconds} and {minutes} stand for how long the command itself is told to take.
    """

    name: str
    priority: int
    least: float
    most: float
    words: Sequence[str]

    @property
    def keeps_time(self) -> bool:
        """Whether the command ends by a clock of its own."""
        return any(word in ("{seconds}", "{minutes}") for word in self.words)

    def command(self, limit: float) -> list[str]:
        own = max(1.0, limit - MARGIN)
        clocks = {"{seconds}": f"{own:.0f}", "{minutes}": f"{own / 60:.2f}"}
        return [clocks.get(word, word) for word in self.words]


def allot(steps: Sequence[Step], seconds: float) -> dict[str, float]:
    """The limit of each step that is kept, by its name."""
    limits: dict[str, float] = {}
    left = seconds
    ranked = sorted(steps, key=lambda step: step.priority)
    for step in ranked:
        if step.least > left:
            break
        limits[step.name] = step.least
        left -= step.least
    for step in ranked[: len(limits)]:
        more = min(left, step.most - step.least)
        limits[step.name] += more
        left -= more
    return limits


def left_out(steps: Sequence[Step], seconds: float) -> Iterator[str]:
    """Why the steps that are not kept are not, a line each."""
    limits = allot(steps, seconds)
    taken = sum(step.least for step in steps if step.name in limits)
    for step in sorted(steps, key=lambda step: step.priority):
        if step.name not in limits:
            yield (
                f"{step.name}: left out, it needs {step.least:.0f} s, and of {seconds:.0f} s those that are more "
                f"valuable leave {max(0.0, seconds - taken):.0f}"
            )
            taken += step.least


def named(flag: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def steps(out: Path, toy: bool) -> list[Step]:
    """The steps, whose rows, tables and pictures go to `out`. `toy`: the same at sizes a CPU can do, all of which fit
    into five minutes.
    """
    measured = str(out / "rows.jsonl")

    def sized(real: str, small: str) -> list[str]:
        return (small if toy else real).split()

    def step(name: str, priority: int, least: float, most: float, *words: str | Sequence[str]) -> Step:
        flat = [word for part in words for word in ([part] if isinstance(part, str) else part)]
        return Step(name, priority, TOY if toy else least, most, flat)

    served = ["--served", "--gate", "case", "--peers", "--budget", "0.01", "--out", measured]
    # gemlite adds up in float16 by atomics, beyond our budget of errors; it is to be beaten all the same.
    int4 = ["bench.ops", "int4_matmul", *named("--impl", INT4_BESIDE), "--ungated", "gemlite", *served]
    prefill = ["bench.ops", "prefill_attention", *named("--impl", PREFILL_BESIDE), *served]
    decode = ["bench.ops", "decode_attention", *named("--impl", DECODE_BESIDE), *served]
    model = ["bench.model", "--out", measured]
    model += sized(
        "--model llama3-vila1.5-8b --layers 4 --weights float16,int4 --prompts 128,2048 --contexts 128,2048 "
        "--histories 16,1024,8160",  # the last with its question is as long as the model was made for
        "--model tiny --layers 1 --weights float32 --prompts 16 --contexts 32 --histories 16,32",
    )
    tune = ["bench.tune", "--budget", "0.01", "--minutes", "{minutes}", "--out", str(out)]
    tune += sized("--candidates 8", "--candidates 1 --workers 1 --case toy")
    int4_tune, triton = [*tune, "int4_matmul", "--impl"], ["--impl", "triton"]
    errors = ["bench.accuracy", "int4_matmul", "--peers", "--out", measured]
    drawn = ["--only", "roofline,time,speedup,model"]
    others = [name for name in names() if name not in ("int4_matmul", "prefill_attention", "decode_attention")]
    rest = ["bench.ops", *sized(f"{' '.join(others)} --budget 0.05", "swiglu --case toy --budget 0.01")]
    checked = ["bench.correctness", "--processes", str(os.cpu_count()), "--seconds", "{seconds}", "--out", measured]
    checked += sized("", "--op swiglu")
    return [
        step("correctness", 1, 80, 165, checked),
        step("int4 goals", 2, 65, 120, int4, "--case", sized("goals", "toy")),
        step("prefill goals", 3, 15, 45, prefill, "--case", sized("whole", "toy")),
        step("decode goals", 4, 20, 45, decode, "--case", sized("decode", "toy")),
        step("goals", 5, 10, 20, "bench.goals", measured),
        step("model", 7, 70, 120, model),
        step("tune int4 decode", 9, 110, 150, int4_tune, sized("gemv splitk --case decode", "splitk")),
        step("tune int4 prefill", 10, 82, 120, int4_tune, sized("prefill --case prefill", "prefill")),
        step("tune decode attention", 11, 70, 120, tune, "decode_attention", triton, sized("--case decode", "")),
        step("tune prefill attention", 12, 70, 120, tune, "prefill_attention", triton, sized("--case whole", "")),
        step("int4 models", 13, 120, 240, int4, "--case", sized("models", "toy")),
        step("other ops", 14, 400, 600, rest, "--peers", "--out", measured),
        step("int4 errors", 15, 65, 120, errors, sized("", "--toy")),
        step("pictures", 8, 22, 60, "bench.plot", str(out), drawn, "--out", str(out / "pictures")),
        step("report", 6, 22, 60, "bench.report", str(out), "--out", str(out / "report.html")),
    ]
