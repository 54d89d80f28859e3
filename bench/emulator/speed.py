"""The speed of the emulator: `python -m bench.emulator.speed`

Emulates calls of production-like sizes in bfloat16, each in a process of its own on one core, with and without checks
and counters, and prints the processor's seconds, the instructions of threads per second and the most memory it held.
Compiling and translating are counted apart, in seconds of a clock.

Exit code: 0 every case meets the goals, 1 one does not, 2 the command failed.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vila_triton.registry import OPS

from .._tool import tool
from ..compiler.cross_compile import run_in_subprocesses
from ..correctness.error_budget import example_args
from . import emulating
from .compile import EMULATED_TARGETS
from .counters.sums import executed_instructions
from .report import Launch

GOAL_RATE = 15e6  # instructions of threads a second, with checks and counters
GOAL_BYTES = 1e9
INT4 = {"dtype": "bfloat16", "order": "sub", "bias": False, "group": 128}
PAGED = {"dtype": "bfloat16", "kv": "plain", "numerics": "fast", "b": 1, "ratio": 4, "d": 128, "l": 256}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemv": ("int4_matmul", "gemv", {**INT4, "m": 1, "n": 4096, "G": 32}),
    "splitk": ("int4_matmul", "splitk", {**INT4, "m": 16, "n": 4096, "G": 32}),
    "prefill": ("int4_matmul", "prefill", {**INT4, "m": 256, "n": 1024, "G": 8}),
    "linear": ("linear", "triton", {"dtype": "bfloat16", "m": 256, "n": 1024, "k": 1024}),
    "decode_attention": ("decode_attention", "triton", {**PAGED, "t": 2048, "g": 8}),
    "prefill_attention": ("prefill_attention", "triton", {**PAGED, "s": 256, "t": 512, "g": 2}),
    "encoder_attention": ("encoder_attention", "triton", {"dtype": "bfloat16", "b": 1, "s": 729, "h": 4, "d": 72}),
    "rms_norm": ("rms_norm", "triton", {"dtype": "bfloat16", "rows": 64, "e": 4096}),
}


@dataclass(frozen=True)
class Measurement:
    """The times and the work of a case.

    bare_seconds         of the processor, without checks and counters
    seconds              of the processor, with both
    compile_seconds      of compiling and translating, by the clock
    thread_instructions  32 for each instruction of a warp
    peak_bytes           the most memory of the process, torch and arguments included
    """

    case: str
    target: str
    bare_seconds: float
    seconds: float
    compile_seconds: float
    thread_instructions: int
    peak_bytes: int

    @property
    def rate(self) -> float:
        return self.thread_instructions / self.seconds

    def meets_goals(self) -> bool:
        return self.rate >= GOAL_RATE and self.peak_bytes < GOAL_BYTES


def measure(item: tuple[str, str]) -> Measurement:
    """Emulates a case for a target in this process."""
    case, target = item
    torch.set_num_threads(1)
    op_name, impl_name, sizes = CASES[case]
    op = OPS[op_name]
    impl = op.impls[impl_name]
    args = example_args(op, 0, **sizes)
    seconds, compile_seconds, launches = [], 0.0, list[Launch]()
    for on in (False, True):
        with emulating(target, checks=on, counters=on) as report:
            impl(*args, config=impl.configs[0])  # compiles and translates
            launches = list(report.launches)
            start = time.process_time()
            impl(*args, config=impl.configs[0])
            seconds.append(time.process_time() - start)
        compile_seconds += report.compile_seconds
    instructions = 32 * sum(x.issued for launch in launches for x in executed_instructions(launch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measurement(case, target, seconds[0], seconds[1], compile_seconds, instructions, peak)


COLUMNS = ("bare, s", "seconds", "compile, s", "M instr", "M instr/s", "MB")
HEADER = " ".join((f"{'':18} {'target':7}", *(f"{x:>10}" for x in COLUMNS)))


def line_of(x: Measurement) -> str:
    """Returns a measurement in one line below `HEADER`."""
    millions = f"{x.thread_instructions / 1e6:10.1f} {x.rate / 1e6:10.1f} {x.peak_bytes / 1e6:10.0f}"
    return f"{x.case:18} {x.target:7} {x.bare_seconds:10.2f} {x.seconds:10.2f} {x.compile_seconds:10.1f} {millions}"


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--targets", nargs="+", choices=EMULATED_TARGETS, default=["sm_80"], help="default: sm_80")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each case instead")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - set(CASES):
        raise ValueError(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if not args.json:
        print(f"goals: {GOAL_RATE / 1e6:.0f} M instructions of threads a second, {GOAL_BYTES / 1e6:.0f} MB\n{HEADER}")
    measured = []
    for item in [(case, target) for target in args.targets for case in args.cases or CASES]:
        measured += run_in_subprocesses(measure, [item], workers=1)  # a fresh process each, for its peak
        print(json.dumps(asdict(measured[-1])) if args.json else line_of(measured[-1]), flush=True)
    if not args.json:
        together = (sum(x.bare_seconds for x in measured), sum(x.seconds for x in measured))
        print(f"{'together':26}", *(f"{seconds:10.2f}" for seconds in together))
    return int(not all(x.meets_goals() for x in measured))


if __name__ == "__main__":
    sys.exit(main())
