"""Files that several processes may write at once."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK = ".lock"  # in a folder that somebody writes


class OtherWork(ValueError):
    """A folder holds the beginnings of something else, or another process writes it."""


@contextmanager
def locked(opened: IO) -> Iterator[None]:
    """Inside, this process alone holds the lock of an open file; others wait for it. A killed process lets go of it."""
    fcntl.flock(opened, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(opened, fcntl.LOCK_UN)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Inside, this process alone changes a file that is replaced as a whole: the lock is FILE.lock, which stays."""
    with file.with_name(f"{file.name}.lock").open("a") as lock, locked(lock):
        yield


def claim(folder: Path) -> IO:
    """A folder for this process alone, until what is returned is closed. Errors: `OtherWork` if another has it."""
    opened = (folder / LOCK).open("a")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        raise OtherWork(f"{folder} is being written by another process; wait for it, or write elsewhere") from None
    return opened
