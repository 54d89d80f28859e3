"""A reader in a process of its own, given one file after another; what no file may bring about is seen and said.

A file is read, or refused: by a `ValueError` or an `OSError`, as the command line takes them, whose words name the file
and are no page. All else is a fault: another exception, a signal, a file that takes forever or more memory than
`Limits` allow, code that runs, a command, a connection, a question on standard input.
"""

import ctypes
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from .mutate import Mutate

PLANTED = "planted"  # the file that code in a damaged file would make in the current folder
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
LONGEST = 2000  # characters of an error
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Reader:
    """A reader of a kind of file.

    count     of damaged files it is tried on
    file      where the file lies in a folder
    prepare   fills the folder with all else; gives the contents that the file has undamaged
    read      reads the folder as the product does
    names     of which an error has one; by default the file
    said      other errors that are as good: their first words
    errors    exceptions that refuse a file
    """

    name: str
    count: int
    file: str
    prepare: Callable[[Path], Sequence[bytes]]
    mutate: Mutate
    read: Callable[[Path], Any]
    names: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    errors: tuple[type[Exception], ...] = (ValueError, OSError)

    def damaged(self, whole: Sequence[bytes], seed: int) -> bytes:
        """The file of a seed."""
        rng = Random(f"{self.name} {seed}")
        return self.mutate(rng, rng.choice(whole))


@dataclass(frozen=True)
class Limits:
    """The limits of reading one file."""

    seconds: float = 60
    memory: int = 2**30


class Fault(NamedTuple):
    """A fault of a reader with a file: faults of a kind have one cause."""

    kind: str
    words: str = ""


class Forbidden(BaseException):
    """A reader does what none may; no `except Exception` hides it."""


class Worker:
    """A process that reads damaged files; there is a new one after a file that it did not come through."""

    def __init__(self, reader: Reader, folder: Path, limits: Limits = Limits()):
        self.reader, self.folder, self.limits = reader, folder, limits
        self.context = multiprocessing.get_context("fork")
        self.process: Any = None

    def fault(self, content: bytes) -> Fault | None:
        """The fault of the reader with a file, None if there is none."""
        if self.process is None:
            # Memory that was freed but not returned could be taken again without growth. Returned before the fork,
            # since the peak of a process begins at what it has when it is forked.
            ctypes.CDLL(None).malloc_trim(0)
            self.pipe, other = self.context.Pipe()
            self.process = self.context.Process(
                target=serve, args=(self.pipe, other, self.reader, self.folder, self.limits), daemon=True
            )
            self.process.start()
            other.close()
        self.pipe.send_bytes(content)
        if not self.pipe.poll(self.limits.seconds):
            self.end()
            return Fault("hang", f"not read within {self.limits.seconds:g} s")
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            result = Fault("signal", signal.Signals(-code).name) if code < 0 else Fault("exit", str(code))
        if result:
            self.end()
        return result

    def end(self) -> None:
        """Let the process go."""
        if self.process is not None:
            self.pipe.close()
            self.process.kill()
            self.process.join()
            self.process = None


def serve(outer: Any, pipe: Any, reader: Reader, folder: Path, limits: Limits) -> None:
    """The process: reads what comes through the pipe, and sends back the fault or None; ends with the outer process."""
    outer.close()
    faulthandler.disable()  # the signal is told by who waits
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = pages()[0] * resource.getpagesize() + 2 * limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    said = open("said", "w+")  # noqa: SIM115 (until the process ends)
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    sys.stdout = sys.stderr = said
    done: list[Fault] = []
    sys.stdin = Asked(done)  # pyright: ignore[reportAttributeAccessIssue]
    sys.addaudithook(lambda event, args: forbid(done, event) if event in FORBIDDEN else None)
    while True:
        try:
            content = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        result = outcome(reader, folder, content, limits.memory) or (done[0] if done else None)
        said.seek(0)
        if not result and "Traceback (most recent call last)" in said.read():
            result = Fault("a traceback was printed")
        said.seek(0)
        said.truncate()
        pipe.send(result)


def pages() -> list[int]:
    """The pages of memory that this process has, and those of them that are resident."""
    return [int(word) for word in Path("/proc/self/statm").read_text().split()]


class Asked:
    """Standard input that nobody may read."""

    def __init__(self, done: list[Fault]):
        self.done = done

    def __getattr__(self, name: str) -> Any:
        if name.startswith("read") or name in ("fileno", "__next__"):
            forbid(self.done, f"sys.stdin.{name}")
        raise AttributeError(name)


def forbid(done: list[Fault], action: str) -> None:
    done.append(Fault("forbidden", action))
    raise Forbidden(action)


def outcome(reader: Reader, folder: Path, content: bytes, memory: int) -> Fault | None:
    """The fault in reading one file, in this process."""
    (folder / reader.file).write_bytes(content)
    before = pages()[1] * resource.getpagesize()
    result = None
    try:
        reader.read(folder)
    except Forbidden as error:
        result = Fault("forbidden", str(error))
    except BaseException as error:
        result = wrong(error, reader)
    if (planted := Path(PLANTED)).exists():
        planted.unlink()
        return Fault("code", "what a file held was run")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return Fault("memory", f"{grown / 2**30:.1f} GB more") if grown > memory else result


def wrong(error: BaseException, reader: Reader) -> Fault | None:
    """The fault of an error, None if it refuses the file as it should."""
    words = str(error) if isinstance(error, OSError) else str(error.args[0] if error.args else error)
    kind, begun = f"{type(error).__name__} at {location(error)}", words[:200]
    if any(isinstance(e, MemoryError) or "can't allocate memory" in str(e) for e in chain(error)):
        return Fault(f"memory, {kind}", begun)
    if not isinstance(error, reader.errors):
        return Fault(kind, begun)
    names = reader.names or (Path(reader.file).name,)
    if not any(name in words for name in names) and not words.startswith(reader.said or "\0"):
        return Fault(f"no name, {kind}", begun)
    return Fault(f"{len(words)} characters, {kind}", begun) if len(words) > LONGEST else None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that it was raised in the handling of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def location(error: BaseException) -> str:
    """The last line of ours that was running."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if ROOT in Path(f.filename).parents]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


@contextmanager
def prepared(reader: Reader, folder: Path, limits: Limits = Limits()) -> Iterator[tuple[Worker, Sequence[bytes]]]:
    """A worker, and the contents that a file has undamaged, which the reader has read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    whole = reader.prepare(folder)
    for content in whole:
        # Without a limit of memory: the peak of this process is that of all it ever did.
        assert not (fault := outcome(reader, folder, content, sys.maxsize)), fault
    worker = Worker(reader, folder, limits)
    try:
        yield worker, whole
    finally:
        worker.end()


def faults(reader: Reader, folder: Path, seeds: Sequence[int]) -> dict[int, Fault]:
    """The faults of a reader with the files of some seeds."""
    with prepared(reader, folder) as (worker, whole):
        result = {seed: worker.fault(reader.damaged(whole, seed)) for seed in seeds}
    return {seed: fault for seed, fault in result.items() if fault}


def report(reader: Reader, result: dict[int, Fault]) -> str:
    """Faults by kind, each with its first seed and the command that reads that file again."""
    kinds: dict[str, list[int]] = {}
    for seed, fault in result.items():
        kinds.setdefault(fault.kind, []).append(seed)
    lines = [
        f"{len(seeds):5} {': '.join(result[seeds[0]])}\n      python -m tests.fuzz {reader.name!r} {seeds[0]}"
        for seeds in sorted(kinds.values(), key=len, reverse=True)
    ]
    return "\n".join([f"{len(result)} files are read wrongly by {reader.name}:", *lines])
