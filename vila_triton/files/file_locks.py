"""Locks for files and folders that several processes may write at once."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK_NAME = ".lock"  # in a folder that somebody writes


class FolderInUseError(ValueError):
    """A folder holds the beginnings of other work, or another process is writing it."""

    @classmethod
    def other_work(cls, folder: Path) -> "FolderInUseError":
        """The error for a folder that holds the beginnings of other work."""
        return cls(f"{folder} holds the beginnings of other work; remove it, or write elsewhere")


@contextmanager
def exclusive_lock(file: IO) -> Iterator[None]:
    """Wait for the exclusive lock of an open file and hold it. It is released when the process is killed."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def sidecar_lock(path: Path) -> Iterator[None]:
    """Hold the lock for changing a file that is replaced as a whole. The lock is a file of its own, PATH.lock, which
    stays.
    """
    with path.with_name(f"{path.name}.lock").open("a") as lock, exclusive_lock(lock):
        yield


def claim_folder(folder: Path) -> IO:
    """Lock a folder until the returned file is closed. Errors: `FolderInUseError` if another process has it."""
    lock = (folder / LOCK_NAME).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise FolderInUseError(
            f"{folder} is being written by another process; wait for it, or write elsewhere"
        ) from None
    return lock
