"""Jobs in processes that are forked from this one, which has imported torch and Triton once for all of them."""

import ast
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..measure import rows

Job = TypeVar("Job")
Extend = Callable[[float], None]  # gives the job so many seconds of its processor from now on
FORK = multiprocessing.get_context("fork")
START_SECONDS = 60.0  # that a job may take before it asks for more
IDLE = 20.0  # times as long in all is given to a job that waits for its processor, or for nothing
POLL_SECONDS = 1.0
PACKAGES = ("PIL", "einops", "safetensors.torch", "tokenizers", "torch.nn", "transformers", "triton")


class Failed(str):
    """In place of a result: "hung", "crashed: signal N", or the traceback of the exception that ended a job."""


@dataclass
class Running:
    """A job in its process, and the seconds of its processor and of `time.monotonic` after which it is given up."""

    job: Any
    process: BaseProcess
    pipe: Connection
    cpu_deadline: float = 0.0
    deadline: float = 0.0

    def extend(self, seconds: float) -> None:
        self.cpu_deadline, self.deadline = self.cpu_seconds() + seconds, time.monotonic() + IDLE * seconds

    def cpu_seconds(self) -> float:
        """Returns the seconds of a processor that the process has taken; 0 where the system does not say."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_over(self) -> bool:
        return self.cpu_seconds() > self.cpu_deadline or time.monotonic() > self.deadline


def work(fn: Callable[[Any, Extend], Any], job: Any, pipe: Connection) -> None:
    """Sends the result of fn(job, extend), without what it prints. If memory runs out, this process is the first to
    end.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    try:
        result = fn(job, lambda seconds: pipe.send(("extend", seconds)))
    except BaseException:
        result = Failed(traceback.format_exc())
    pipe.send(("result", result))
    sys.stdout.flush()
    os._exit(0)  # without atexit and threads of torch


def prepare_to_fork(*modules: str) -> None:
    """Imports these modules and whatever vila_triton and the tests need of other packages, and lets torch start no
    threads, which a forked process would not have.
    """
    os.environ["HYPOTHESIS_PROFILE"] = "ci"  # the same cases each time
    torch.set_num_threads(1)
    for name in ("pytest", "hypothesis.strategies", *modules):
        importlib.import_module(name)
    for file in (rows.ROOT / "vila_triton").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module in PACKAGES:
                for alias in node.names:  # transformers imports what belongs to a name when it is asked for it
                    getattr(importlib.import_module(node.module), alias.name, None)


def run_processes(fn: Callable[[Job, Extend], Any], jobs: deque[Job], processes: int) -> Iterator[tuple[Job, Any]]:
    """Yields (job, fn(job, extend)) as results come, from at most so many processes at a time; `jobs` may grow.

    The result of a job that raises, dies, or does not `extend` its time before that is over is `Failed`. All processes
    end with the generator.
    """
    running = list[Running]()
    try:
        while jobs or running:
            while jobs and len(running) < processes:
                running.append(start(fn, jobs.popleft()))
            wait([x.pipe for x in running], POLL_SECONDS)
            for x in list(running):
                result = receive(x)
                if result is None and x.is_over():
                    result = Failed("hung")
                if result is not None:
                    running.remove(x)
                    end(x)
                    yield x.job, result
    finally:
        for x in running:
            end(x)


def start(fn: Callable[[Any, Extend], Any], job: Any) -> Running:
    """Forks the process of a job."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(fn, job, sender), daemon=True)
    process.start()
    sender.close()
    running = Running(job, process, receiver)
    running.extend(START_SECONDS)
    return running


def receive(x: Running) -> Any:
    """Returns the result of a process that has ended, or None, and takes note of a new deadline."""
    try:
        while x.pipe.poll():
            kind, value = x.pipe.recv()
            if kind == "result":
                return value
            x.extend(value)
    except EOFError:
        x.process.join()
        code = x.process.exitcode or 0
        return Failed(f"crashed: signal {-code}" if code < 0 else f"crashed: exit code {code}")
    return None


def end(x: Running) -> None:
    """Kills the process, if it still runs, and forgets it."""
    x.process.kill()
    x.process.join()
    x.pipe.close()
