"""Files that several processes may write at once."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK_NAME = ".lock"  # in a folder that somebody writes


class FolderInUseError(ValueError):
    """A folder holds the beginnings of something else, or another process writes it."""


@contextmanager
def exclusive_lock(file: IO) -> Iterator[None]:
    """Inside, this process alone holds the lock of an open file; others wait for it. A killed process lets go of it."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def sidecar_lock(path: Path) -> Iterator[None]:
    """Inside, this process alone changes a file that is replaced as a whole: the lock is FILE.lock, which stays."""
    with path.with_name(f"{path.name}.lock").open("a") as lock, exclusive_lock(lock):
        yield


def claim_folder(folder: Path) -> IO:
    """A folder for this process alone, until what is returned is closed. Errors: `OtherWork` if another has it."""
    lock = (folder / LOCK_NAME).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise FolderInUseError(
            f"{folder} is being written by another process; wait for it, or write elsewhere"
        ) from None
    return lock
