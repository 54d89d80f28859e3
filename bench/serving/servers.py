"""Processes that serve a model with vLLM: with our kernels, and with vLLM's own on the same model class.

vLLM needs an environment of its own (vila_triton/README.md says how to make one): its Python is named by whoever asks.
Both servers get the same options and the same variables, those that vLLM's manual recommends for a CPU.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from bench.measure.rows import CHILD_FOLDER, IN_CHECKOUT, ROOT
from bench.measure.vllm_engine import ENVIRONMENT
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.files.reading import LoadError

from .client import ServerError, served_model

OURS, VLLM = "vila-triton", "vllm's kernels"
ATTENTION_OF_VLLM = {"cpu": "CPU_ATTN", "cuda": "FLASH_ATTN"}
OPTIONS = ("--max-num-seqs", "16", "--disable-log-stats")
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # of the engine alone, which a server runs in a process of its own


def server_command(
    python: Path, model: Path, url: str, dtype: str, settings: Sequence[str], vllm_options: Sequence[str]
) -> list[str]:
    """Returns the command of a server: settings are options of `vila-triton serve`, the others of vLLM."""
    parts = urlsplit(url)
    address = ["--host", str(parts.hostname), "--port", str(parts.port)]
    command = [str(python), "-m", "vila_triton", "serve", str(model), *address, "--dtype", dtype]
    return [*command, *settings, "--", *OPTIONS, *vllm_options]


def own_kernel_options(model: Path, device_type: str) -> list[str]:
    """Returns options that make vLLM run its own attention, and its AWQ linears where a model's are int4.

    Errors: those of a folder.
    """
    options = ["--attention-backend", ATTENTION_OF_VLLM[device_type]]
    cfg = check_checkpoint(open_checkpoint(model)).llm
    if not cfg.group_size:
        return options
    awq = {"quant_method": "awq", "bits": 4, "group_size": cfg.group_size, "zero_point": True}
    awq |= {"modules_to_not_convert": list(cfg.dense_linears)}
    return [*options, "--hf-overrides", json.dumps({"quantization_config": awq})]


def server_environment(python: Path) -> Mapping[str, str]:
    """Returns the environment of a server."""
    preloaded = [str(file) for file in (python.absolute().parents[1] / "lib").glob("libiomp5.so")]
    variables = {name: value for name, value in ENVIRONMENT.items() if name != IN_PROCESS}
    path = os.pathsep.join(filter(None, (str(ROOT) if IN_CHECKOUT else "", os.environ.get("PYTHONPATH"))))
    return {**os.environ, **variables, "PYTHONPATH": path, "LD_PRELOAD": ":".join(preloaded)}


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Served:
    """A server that answers: the name of its model, and the session of its processes."""

    model: str
    session: int


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], url: str, start_seconds: float
) -> Generator[Served, None, None]:
    """Runs a server within a `with` block, which begins when it answers; at the end all its processes are ended.

    Errors: OSError; RuntimeError with what it said last if it ends before it answers, or does not in these seconds.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=CHILD_FOLDER, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield Served(wait_for_model(process, url, start_seconds, log), process.pid)
        finally:
            end_session(process)


def wait_for_model(process: subprocess.Popen[bytes], url: str, seconds: float, log: IO[bytes]) -> str:
    """Returns the name of the model that a server offers, as soon as it answers. Errors: see `running`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}: {last_words(log)}")
        with suppress(OSError, EOFError, ServerError, LoadError):
            return served_model(url)
        time.sleep(0.5)
    raise RuntimeError(f"the server does not answer after {seconds:g} s: {last_words(log)}")


def last_words(log: IO[bytes]) -> str:
    """Returns the last line of a log that names an error, or else its last line."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines() or ["it says nothing"]
    errors = [line for line in lines if "Error" in line]
    return " ".join((errors or lines)[-1].split())[-300:]


def end_session(process: subprocess.Popen[Any]) -> None:
    """Ends a process and all that it started: politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
