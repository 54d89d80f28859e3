"""Results as rows: one JSON object a line, each with what it was measured on. Plots are made from rows alone."""

import json
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def device_name(device: torch.device) -> str:
    """What the machine calls its processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = [x for x in cpu_info() if x.startswith("model name")]
    cores = f"{torch.get_num_threads()} threads"
    return f"{found[0].split(':')[1].strip()}, {cores}" if found else f"{platform.machine()} CPU, {cores}"


def cpu_info() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


@lru_cache
def commit() -> str:
    """The commit checked out, with a + if files differ from it; "unknown" outside a checkout."""
    try:
        head, changed = (
            subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def stamp(device: torch.device) -> dict[str, str]:
    """Where and when a row was measured: goes into every row."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows; each is on disk before the next is asked for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
            out.flush()


def read(*files: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of the files, or those of one kind. Errors: ValueError naming file and line of what is no row."""
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number} is not a row: {error}") from None
            if kind is None or row.get("kind") == kind:
                yield row
