"""The jobs of a search: compile a candidate, emulate it, gate it, time it. A job and its answer are plain JSON.

    {"stage": "compile", "op": ..., "impl": ..., "config": {...}, "sizes": {...}, "arch": "sm_90"}
        -> {"reason": why it may not be launched or None, "registers": ..., "spills": ..., "shared": ...}
    {"stage": "emulate", ...}
        -> {"reason": why it cannot run or None, "sectors", "fewest_sectors", "accesses", "wavefronts": numbers of them}
    {"stage": "gate", ...}  -> {"reason": why its numbers are not those of the op, or None}
    {"stage": "time", ..., "budget": seconds}  -> {"seconds": ..., "again": ...} or {"reason": ...}

`python -m bench.tuner.jobs [PATH ...]` discovers the kernels of the paths, answers the jobs on its standard input, one
per line, and ends when that is closed, in the middle of a job if need be. Each stage has processes of its own: their
environments differ, and a kernel that kills its process or its CUDA context does not end the search.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from vila_triton.registry import OPS, Impl, IntRange, OneOf, discover

from .. import standin
from ..compiler.cross_compile import CompileRequest, compile_request
from ..compiler.gpus import TARGETS
from ..compiler.resources import kernel_resources
from ..correctness.failure_report import refusal_reason, release_memory
from ..correctness.gate import gate
from ..emulator.counters.emulated_call import emulate_call
from ..measure.cases import Case, random_arguments
from ..measure.timing import time_call

Job = Mapping[str, Any]
Answer = dict[str, Any]
COMPILERS = ("compile", "emulate")  # stages that compile for a GPU which need not be there


def command_prefix(stage: str) -> list[str]:
    """Returns the beginning of the command of a stage's processes; compilers never run on the stand-in."""
    return [sys.executable, "-m"] if stage in COMPILERS else standin.command_prefix()


def stage_environment(stage: str) -> dict[str, str]:
    """Returns the environment variables of a stage's processes; kernels are interpreted only to gate them on a CPU."""
    interpreted = stage not in COMPILERS and not torch.cuda.is_available()
    threads = {} if stage == "time" else {"OMP_NUM_THREADS": "1"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if stage in COMPILERS else {}
    return {"TRITON_INTERPRET": str(int(interpreted)), **threads, **hidden}


def compile_equivalent_sizes(domain: Mapping[str, IntRange | OneOf], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns small sizes for which the compiler makes the same kernel: it distinguishes 1, multiples of 16 and other
    numbers.

    This holds for sizes that are arguments of a kernel. Where one is a constant, a similar kernel is made; of a `OneOf`
    each value is kept.
    """
    equivalent = dict(sizes)
    for name, values in domain.items():
        if isinstance(values, IntRange) and sizes[name] != 1:
            alike = [
                n for n in range(values.low, values.high + 1) if n > 1 and (n % 16 == 0) == (sizes[name] % 16 == 0)
            ]
            equivalent[name] = max(alike, default=16 + sizes[name] % 16)
    return equivalent


def find_impl(job: Job) -> Impl:
    """Returns the implementation of a job."""
    discover()
    return OPS[job["op"]].impls[job["impl"]]


def compile_job(job: Job) -> Answer:
    """Cross-compiles. A kernel that spills registers or wants more shared memory than there is will not be launched."""
    find_impl(job)
    outcome = compile_request(
        kernel_resources, CompileRequest(job["op"], job["impl"], job["config"], job["arch"], job["sizes"])
    )
    if reason := outcome.error or outcome.unsupported:
        return {"reason": reason.splitlines()[0]}
    worst = {name: max((getattr(k, name) for k in outcome.kernels), default=0) for name in RESOURCE_FIELDS}
    max_shared = TARGETS[job["arch"]].max_shared_per_block
    reason = None
    if worst["shared"] > max_shared:
        reason = f"wants {worst['shared']} bytes of shared memory, a block of {job['arch']} has {max_shared}"
    elif worst["spills"]:
        reason = f"spills {worst['spills']} bytes of registers a thread on {job['arch']}"
    return {"reason": reason, **worst}


RESOURCE_FIELDS = ("registers", "spills", "shared")


def emulate_job(job: Job) -> Answer:
    """Runs the compiled kernels of a candidate in the emulator and counts what they do with memory."""
    find_impl(job)
    request = CompileRequest(job["op"], job["impl"], job["config"], job["arch"], job["sizes"])
    result = emulate_call(request, checks=False)
    if reason := result.error or result.unsupported:
        return {"reason": reason.splitlines()[0]}
    return {"reason": None} | {name: sum(row[name] for row in result.kernels) for name in TRAFFIC_FIELDS}


TRAFFIC_FIELDS = ("sectors", "fewest_sectors", "accesses", "wavefronts")


def current_device() -> torch.device:
    """Returns the current GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gate_job(job: Job) -> Answer:
    """Checks the numbers of a candidate."""
    reason = gate(find_impl(job), job["config"], Case(job["op"], "tune", job["sizes"]))
    if reason:
        release_memory(current_device())  # a context the kernel broke ends this process, not the candidates after it
    return {"reason": reason}


@lru_cache(maxsize=1)
def cached_arguments(op: str, sizes: str, device: torch.device) -> Any:
    """Returns the arguments of some sizes; the last ones are kept."""
    return random_arguments(Case(op, "tune", json.loads(sizes)), device)


def time_job(job: Job) -> Answer:
    """Times a candidate, or says why it could not be timed."""
    device = current_device()
    impl, config = find_impl(job), job["config"]
    try:
        args = cached_arguments(job["op"], json.dumps(job["sizes"]), device)
        timing = time_call(lambda *args: impl(*args, config=config), args, device, job["budget"])
    except Exception as error:  # whatever is wrong with one candidate, the others go on
        reason = refusal_reason(error)
    else:
        return {"seconds": timing.seconds, "again": timing.again, "cold": timing.cold, "graph": timing.graph}
    cached_arguments.cache_clear()
    release_memory(device)
    return {"reason": reason}


STAGES: dict[str, Callable[[Job], Answer]] = {
    "compile": compile_job,
    "emulate": emulate_job,
    "gate": gate_job,
    "time": time_job,
}


def run_job(job: Job) -> Answer:
    """Does a job of any stage."""
    return STAGES[job["stage"]](job)


def main() -> None:
    """Answers jobs from standard input until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what kernels print is no answer
    discover(*sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search to handle
    jobs: SimpleQueue[str] = SimpleQueue()

    def receive() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)

    Thread(target=receive, daemon=True).start()
    while True:
        print(json.dumps(run_job(json.loads(jobs.get()))), file=answers, flush=True)


if __name__ == "__main__":
    main()
