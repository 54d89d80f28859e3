"""20,000 damaged files, each read or refused in a sentence; and that faults of every kind are seen at all."""

import ctypes
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .known import KNOWN
from .mutate import PICKLES, of_bytes
from .readers import READERS
from .worker import Limits, Reader, Worker, faults, prepared, report

AT_ONCE = 200  # files of one reader to a test, so that processes share them
PARTS = [(name, first) for name, reader in READERS.items() for first in range(0, reader.count, AT_ONCE)]


def folder(tmp_path: Path) -> Path:
    (directory := tmp_path / "folder").mkdir()
    return directory


@pytest.mark.fuzz
@pytest.mark.parametrize("name, first", PARTS)
def test_damaged_file_is_read_or_refused_in_one_sentence(name: str, first: int, tmp_path: Path) -> None:
    reader = READERS[name]
    faults_by_seed = faults(reader, folder(tmp_path), range(first, min(first + AT_ONCE, reader.count)))
    assert not faults_by_seed, report(reader, faults_by_seed)


def test_there_are_20_000_damaged_files() -> None:
    assert sum(reader.count for reader in READERS.values()) >= 20_000


@pytest.mark.parametrize("name", KNOWN)
def test_known_misread_file_is_refused(name: str, tmp_path: Path) -> None:
    with prepared(READERS[name], folder(tmp_path)) as (worker, _):
        faults_by_seed = {content: worker.fault(content) for content in KNOWN[name]}
    assert not any(faults_by_seed.values()), faults_by_seed


def raising(error: BaseException) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        raise error

    return read


def traced(folder: Path) -> None:
    try:
        raise ValueError("x")
    except ValueError:
        traceback.print_exc()


def hidden(folder: Path) -> None:
    try:
        bytearray(2**31)
    except MemoryError:
        raise ValueError("file is wrong") from None


PLANTED = {  # what a reader does, and the kind of fault
    "crashes": (lambda folder: ctypes.string_at(0), "signal"),
    "lacks a key": (raising(KeyError("a")), "KeyError at"),
    "lacks a name": (raising(ValueError("it is wrong")), "no name, ValueError at"),
    "says a page": (raising(ValueError(f"file {'x' * 5000}")), "5005 characters"),
    "ends": (raising(SystemExit()), "SystemExit at"),
    "takes 2 GB": (lambda folder: bytearray(2**31), "memory"),
    "takes 50 MB": (lambda folder: bytearray(b"x") * (50 * 2**20), "memory"),
    "hides that it takes 2 GB": (hidden, "memory"),
    "never ends": (lambda folder: time.sleep(60), "hang"),
    "runs code": (lambda folder: pickle.loads(PICKLES[1]), "code"),
    "runs a command": (lambda folder: pickle.loads(PICKLES[0]), "forbidden"),
    "asks": (lambda folder: input(), "forbidden"),
    "prints a traceback": (traced, "a traceback was printed"),
}


@pytest.mark.parametrize("read, kind", PLANTED.values(), ids=PLANTED)
def test_mutated_reader_is_detected(read: Callable[[Path], Any], kind: str, tmp_path: Path) -> None:
    reader = Reader("planted", 1, "file", lambda folder: [b"whole"], of_bytes, read)
    worker = Worker(reader, tmp_path, Limits(seconds=0.3, memory=2**25))
    try:
        fault = worker.fault(b"content")
        assert fault and fault.kind.startswith(kind), fault
        assert worker.fault(b"content") == fault  # another process took its place
        assert "python -m tests.fuzz 'planted' 7" in report(reader, {7: fault})
    finally:
        worker.end()


@pytest.mark.parametrize("reader", ("takes 50 MB", "ends"))
def test_memory_is_measured_whatever_the_heap_has_free(reader: str, tmp_path: Path) -> None:
    blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]
    above = bytearray(b"x") * 100_000  # keeps the 200 MB below it in the heap when they are freed
    del blocks
    read, kind = PLANTED[reader]
    test_mutated_reader_is_detected(read, kind, tmp_path)
    del above


def test_correct_reader_is_not_flagged(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        content = (folder / "file").read_bytes()
        if content != b"whole":
            raise ValueError(f"{folder / 'file'} is {content[:10]!r}, expected 'whole'")

    reader = Reader("right", 99, "file", lambda folder: [b"whole"], of_bytes, read)
    assert faults(reader, tmp_path, range(99)) == {}
    assert [reader.damaged([b"whole"], seed) for seed in range(9)] == [reader.damaged([b"whole"], i) for i in range(9)]
