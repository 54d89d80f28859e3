"""Processes that write one file at once: nothing is lost or torn, and a killed process blocks nobody."""

import csv
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import compile_sweep
from bench.measure import rows
from bench.tuner import table
from vila_triton.files.file_locks import claim_folder, exclusive_lock, sidecar_lock
from vila_triton.registry import tuned_tables

WRITERS, EACH = 8, 12


def together(f: Callable[[int], None]) -> None:
    """Run f(0), f(1), ... in processes of their own that begin at the same moment."""
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(WRITERS)

    def write_row(i: int) -> None:
        start.wait()
        f(i)

    processes = [fork.Process(target=write_row, args=(i,)) for i in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * WRITERS


def test_concurrent_writes_of_a_tuned_table_lose_no_entry(tmp_path: Path) -> None:
    def tune(i: int) -> None:
        for j in range(EACH):
            entry = dict.fromkeys(("kernel", "space", "triton"), "") | {
                "ranges": [],
                "otherwise": {"config": {"BLOCK": 8}},
            }
            table.write_table(tmp_path, "Toy GPU", {"op": "none", "impl": f"{i}-{j}", **entry})

    together(tune)
    entries = tuned_tables.read_table(tuned_tables.table_path("Toy GPU", tmp_path))
    assert {e["impl"] for e in entries["entries"]} == {f"{i}-{j}" for i in range(WRITERS) for j in range(EACH)}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["toy-gpu.json", "toy-gpu.json.lock"]


@pytest.mark.parametrize("before", ["", '{"kind": "whole"}', '{"kind": "cut o'])
def test_concurrent_appends_lose_no_row(before: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(before)
    filler = "x" * 20_000  # more than a pipe or a page takes at once
    together(lambda i: rows.write(file, ({"kind": "row", "at": [i, j], "filler": filler} for j in range(EACH))))
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["at"] for row in entries if row["kind"] == "row") == [
        [i, j] for i in range(WRITERS) for j in range(EACH)
    ]
    assert len(entries) == WRITERS * EACH + before.endswith("}")


def test_concurrent_appends_to_a_sweep_table_write_one_header(tmp_path: Path) -> None:
    together(lambda i: compile_sweep.append_csv(tmp_path / "sweep.csv", [{"op": f"op {i}"}] * EACH))
    with (tmp_path / "sweep.csv").open(newline="") as stream:
        ops = [row["op"] for row in csv.DictReader(stream)]
    assert sorted(ops) == sorted(f"op {i}" for i in range(WRITERS) for _ in range(EACH))


def test_killed_process_releases_its_lock(tmp_path: Path) -> None:
    ready, write_end = os.pipe()
    child = os.fork()
    if not child:
        with sidecar_lock(tmp_path / "table.json"), claim_folder(tmp_path):
            os.write(write_end, b"1")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(ValueError, match="is being written by another process"):
        claim_folder(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with sidecar_lock(tmp_path / "table.json"), claim_folder(tmp_path):
        pass


def test_append_waits_for_a_repair(tmp_path: Path) -> None:
    """A line that another process is still writing looks like one that was cut off."""
    file = tmp_path / "rows.jsonl"
    with file.open("ab", buffering=0) as stream, exclusive_lock(stream):
        stream.write(b'{"kind": "fir')
        child = os.fork()
        if not child:
            rows.write(file, [{"kind": "second"}])
            os._exit(0)
        time.sleep(0.3)
        stream.write(b'st"}\n')
    assert os.waitpid(child, 0)[1] == 0
    assert [row["kind"] for row in rows.read(file)] == ["first", "second"]
