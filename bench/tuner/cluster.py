"""The jobs of a search as tasks of a Ray cluster. https://docs.ray.io"""

import os
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from math import inf

import torch

from vila_triton.registry.sources import kernel_paths

from ..measure import rows
from .jobs import Answer, Job
from .workers import ProcessPool

RETRIES = 3  # of a task whose worker dies
BATCH = 2  # jobs a task
RAY_CONFIG = {"worker_niceness": 0}  # that of any process; Ray's workers have less
GPUS_PER_TASK = {"compile": 0, "emulate": 0, "gate": 0.25, "time": 1}  # a task takes, where there are any


_processes: dict[str, ProcessPool] = {}  # of a worker, by the GPUs it was given


def run_jobs(stage: str, jobs: Sequence[Job], paths: Sequence[str] = ()) -> list[Answer]:
    """Does the jobs of one task in a process of the worker, one per stage, which the next task finds again.

    paths: absolute ones of kernels, on every machine of the cluster.
    """
    processes = _processes.setdefault(os.environ.get("CUDA_VISIBLE_DEVICES", ""), ProcessPool(1, paths))
    return [processes.run_job(stage, job) for job in jobs]


class RayCluster:
    """Tasks of a few jobs each. Ray gives a task to another worker if its own dies.

    address: that of a running cluster whose GPUs, if any, are like the one here, to which this checkout is sent (an
    installed package has to be installed there, too); or "local" to start a cluster of `count` workers. Errors:
    ValueError if Ray is not installed or does not reach the cluster.
    """

    def __init__(self, address: str, count: int):
        try:
            self.ray = import_module("ray")
        except ModuleNotFoundError:
            raise ValueError("--ray: Ray is not installed; pip install ray") from None
        if address == "local":
            path = {"env_vars": {"PYTHONPATH": str(rows.ROOT)}} if rows.IN_CHECKOUT else {}
            start = {"num_cpus": count, "include_dashboard": False, "runtime_env": path, "_system_config": RAY_CONFIG}
        else:
            checkout = {"working_dir": str(rows.ROOT), "excludes": [".git", "bench/results", "*.safetensors"]}
            start = {"address": address, "runtime_env": checkout if rows.IN_CHECKOUT else {}}
        try:
            self.ray.init(**start, log_to_driver=False, logging_level="error")
        except ConnectionError as error:
            raise ValueError(f"--ray: no cluster at {address}: {error}") from None
        self.num_workers = int(self.ray.cluster_resources().get("CPU", 1))
        self.task = self.ray.remote(max_retries=RETRIES)(run_jobs)

    def run(self, stage: str, jobs: Sequence[Job], deadline: float = inf) -> Iterator[tuple[int, Answer]]:
        gpus = GPUS_PER_TASK[stage] if torch.cuda.is_available() else 0
        task = self.task.options(num_gpus=gpus)
        batches = [range(i, min(i + BATCH, len(jobs))) for i in range(0, len(jobs), BATCH)]
        running = {task.remote(stage, [jobs[i] for i in batch], kernel_paths()): batch for batch in batches}
        while running:
            left = None if deadline == inf else max(0.0, deadline - time.monotonic())
            ready, _ = self.ray.wait(list(running), timeout=left)
            if not ready:
                for task_ref in running:
                    self.ray.cancel(task_ref, force=True)
                raise TimeoutError
            finished = ready[0]
            batch = running.pop(finished)
            try:
                yield from zip(batch, self.ray.get(finished))
            except self.ray.exceptions.WorkerCrashedError:
                if len(batch) == 1:
                    yield batch[0], {"reason": f"its process died {RETRIES + 1} times"}
                else:  # a job of the batch kills its worker; which one, shows when each is a task
                    running |= {task.remote(stage, [jobs[i]], kernel_paths()): range(i, i + 1) for i in batch}

    def close(self) -> None:
        self.ray.shutdown()
