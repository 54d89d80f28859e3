"""Processes of this machine that do the jobs of a search; `cluster` has those of a Ray cluster.

Processes are in the group of the search: killing the group leaves none behind. If only the search is killed, they end
when their standard input is closed.
"""

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from math import inf
from typing import Protocol

from ..measure import rows
from .jobs import Answer, Job, command_prefix, stage_environment

MAX_TRIES = 2  # for a job whose process dies


class Workers(Protocol):
    """`num_workers` is the number of a stage's jobs that run at a time. `run` yields (number of the job, answer) as
    answers come, in any order, and repeats a job whose process dies. Errors: TimeoutError once the deadline, of
    `time.monotonic`, has passed; running jobs are given up then.
    """

    num_workers: int

    def run(self, stage: str, jobs: Sequence[Job], deadline: float = inf) -> Iterator[tuple[int, Answer]]: ...

    def close(self) -> None: ...


class Process:
    """One `python -m bench.tuner.jobs`, which discovers the kernels of some paths."""

    def __init__(self, stage: str, paths: Sequence[str] = ()):
        self.abandoned = False  # ended on purpose, so that nobody waits for its answer
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the object)
        self.process = subprocess.Popen(
            [*command_prefix(stage), "bench.tuner.jobs", *paths],
            cwd=rows.CHILD_FOLDER,
            env={**os.environ, **stage_environment(stage)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )

    def ask(self, job: Job) -> Answer | None:
        """Returns the answer to a job; None if the process died."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def kill(self) -> str:
        """Kills the process if it still runs; returns the last line it wrote, or the signal that ended it."""
        self.process.kill()
        code = self.process.wait()
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").split("\n")
        output = [line for line in lines if line.strip()]
        return f"signal {-code}" if code < 0 or not output else output[-1]


class ProcessPool:
    """`count` processes per stage, but one for times, so that it has the machine to itself.

    paths: absolute ones of kernels that they discover.
    """

    def __init__(self, count: int, paths: Sequence[str] = ()):
        self.num_workers, self.paths = count, paths
        self.idle: dict[str, queue.SimpleQueue[Process]] = {}
        self.all: set[Process] = set()
        self.busy: set[Process] = set()
        self.lock = threading.Lock()
        self.closed = False

    def run(self, stage: str, jobs: Sequence[Job], deadline: float = inf) -> Iterator[tuple[int, Answer]]:
        pool = ThreadPoolExecutor(1 if stage == "time" else self.num_workers)
        try:
            numbers = {pool.submit(self.run_job, stage, job): i for i, job in enumerate(jobs)}
            left = None if deadline == inf else deadline - time.monotonic()
            for done in as_completed(numbers, left):
                yield numbers[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.kill(self.busy)

    def run_job(self, stage: str, job: Job) -> Answer:
        """Returns the answer to one job, from a second process if the first dies."""
        failure = ""
        for _ in range(MAX_TRIES):
            process = self.acquire(stage)
            if process is None:
                break
            answer = process.ask(job)
            with self.lock:
                self.busy.discard(process)
                if answer is not None and not process.abandoned:
                    self.idle[stage].put(process)
            if answer is not None or process.abandoned:
                return answer or {}
            failure = process.kill()
        return {"reason": f"its process died {MAX_TRIES} times: {failure}"}

    def acquire(self, stage: str) -> Process | None:
        """Returns an idle process, a new one if there is none; None once closed."""
        with self.lock:
            if self.closed:
                return None
            idle = self.idle.setdefault(stage, queue.SimpleQueue())
            process = Process(stage, self.paths) if idle.empty() else idle.get()
            self.all.add(process)
            self.busy.add(process)
            return process

    def kill(self, processes: set[Process]) -> None:
        """Kills processes, idle or not."""
        with self.lock:
            for process in processes:
                process.abandoned = True
                process.process.kill()
                process.process.wait()

    def close(self) -> None:
        self.closed = True
        self.kill(self.all)
