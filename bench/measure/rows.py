"""Results as rows: one JSON object per line, each with the machine and the versions it was measured with.

A process may be killed at any moment. A line is written at once; a last line that was cut off nevertheless is left out
by readers, and removed by the next writer.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
import triton

from vila_triton.files.file_locks import exclusive_lock
from vila_triton.files.reading import require_file

ROOT = Path(__file__).resolve().parents[2]
IN_CHECKOUT = (ROOT / "pyproject.toml").exists()  # else bench is installed, and ROOT the folder of packages
CHILD_FOLDER = ROOT if IN_CHECKOUT else None  # to start `python -m bench.COMMAND` in; None: where this process is
USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CACHE = ROOT / ".cache" if IN_CHECKOUT else USER_CACHE / "vila-triton"  # of what makes the next run of a command better
STAMP = ("device", "torch", "triton", "python", "commit", "date")  # where and when a row was measured
RESULTS = ROOT / "bench" / "results" if IN_CHECKOUT else Path("results")
RENAMED_METHODS = {"upstream": "llm-awq", "ours": "awq-gptq"}  # of bench.quality
WRITTEN_FILES: dict[Path, None] = {}  # the files this process wrote rows to, for who interrupts it


def device_name(device: torch.device) -> str:
    """Returns the name of the device, of a CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model_names = [x for x in cpu_info() if x.startswith("model name")]
    cores = f"{torch.get_num_threads()} threads"
    return f"{model_names[0].split(':')[1].strip()}, {cores}" if model_names else f"{platform.machine()} CPU, {cores}"


def cpu_info() -> list[str]:
    """Returns the lines of /proc/cpuinfo, none where there is no such file."""
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


@lru_cache
def commit() -> str:
    """Returns the commit checked out, with a + if tracked files differ from it; "unknown" outside a checkout."""
    if not (ROOT / ".git").exists():  # git would look for one further up, that of another project
        return "unknown"
    try:
        head, changed = (
            subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def stamp(device: torch.device) -> dict[str, str]:
    """Returns the device, versions, commit and date, which go into every row."""
    versions = torch.__version__, triton.__version__, platform.python_version()
    return dict(zip(STAMP, (device_name(device), *versions, commit(), date.today().isoformat()), strict=True))


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows to a file; each is on disk before the next is asked for. Others may append to it at
    the same time.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    WRITTEN_FILES[file] = None
    with file.open("a+b", buffering=0) as out:
        for row in rows:
            with exclusive_lock(out):
                repair_last_line(out)
                out.write(json.dumps(row).encode() + b"\n")


def repair_last_line(out: BinaryIO) -> None:
    """Ends the last line of a file, or removes it if it was cut off."""
    if not out.seek(0, os.SEEK_END):
        return
    out.seek(-1, os.SEEK_END)
    if out.read(1) != b"\n":
        out.seek(0)
        content = out.read()
        start = content.rfind(b"\n") + 1
        if is_complete_row(content[start:]):
            out.write(b"\n")
        else:
            out.truncate(start)


def is_complete_row(line: bytes) -> bool:
    """Returns whether a last line without an end of line is a row all the same: one that was cut off is no JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read(*files: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of the files, or those of one kind. A last line that was cut off is left out with a note on
    stderr.

    Errors: ValueError naming file and line of a line that is no row; `LoadError` for a path that is no file.
    """
    for file in files:
        require_file(file)
        *lines, last_line = file.read_bytes().split(b"\n")
        if is_complete_row(last_line):
            lines.append(last_line)
        elif last_line:
            print(f"{file}:{len(lines) + 1} was cut off in the middle and is left out", file=sys.stderr)
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}:{number} is not a row: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}:{number} is not a row: it is no object")
            if kind is None or row.get("kind") == kind:
                yield with_present_names(row)


def with_present_names(row: dict[str, Any]) -> dict[str, Any]:
    """Renames in a row what it called differently in the last release."""
    if "pictures" in row:
        row["images"] = row.pop("pictures")
    if row.get("kind") == "shadow" and "times" in row:
        row["budget_multiple"] = row.pop("times")
    if row.get("what") == "stream":
        row["what"] = "streaming"
    if row.get("kind") == "quality" and row.get("method") in RENAMED_METHODS:
        row["method"] = RENAMED_METHODS[row["method"]]
    return row
