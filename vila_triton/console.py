"""Exit codes of commands, and their lines on standard error: errors without tracebacks, and progress."""

import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141  # the last two: 128 and the number of the signal
CLEAR_LINE = "\r\033[K"  # on a terminal
EXPECTED_ERRORS = (OSError, ValueError, KeyError, RuntimeError, MemoryError)  # not bugs: reported in one line


def exit_code(name: str, run: Callable[[], int | None], failure_code: int = EXIT_FAILED) -> int:
    """Run a command, the parsing of its arguments included, and return its exit code for `sys.exit`.

    An expected error becomes one line on standard error and `failure_code`; Ctrl-C and a closed pipe (`| head`) end the
    command without a traceback too.
    """
    try:
        try:
            return run() or 0
        finally:
            if sys.stdout:  # None where the shell closed it
                sys.stdout.flush()  # not first at Python's exit, where nobody could catch what it raises
    except KeyboardInterrupt as error:
        code, cause = EXIT_INTERRUPTED, error
    except EXPECTED_ERRORS as error:
        code, cause = failure_code, error
    if isinstance(cause, BrokenPipeError) and (reader_is_gone(sys.stdout) or reader_is_gone(sys.stderr)):
        code = EXIT_BROKEN_PIPE
    else:
        print_error(name, cause)
    for stream in (sys.stdout, sys.stderr):
        discard_unwritten(stream)
    return code


def print_error(name: str, error: BaseException) -> None:
    """Print an error in one line on standard error."""
    with suppress(OSError):
        print(f"{CLEAR_LINE if stderr_is_terminal() else ''}{name}: {error_text(error)}", file=sys.stderr, flush=True)


def print_progress(text: str, is_last: bool = False) -> None:
    """On a terminal, write a line on standard error in place of the one before; empty text clears it."""
    if stderr_is_terminal():
        print(f"{CLEAR_LINE}{text}", end="\n" if is_last else "", file=sys.stderr, flush=True)


class Progress:
    """A progress line: how much of a total is done and the seconds left, twice a second on a terminal, else nothing.

    `describe` turns a count into text; `unit` follows it.
    """

    def __init__(self, describe: Callable[[int], str] = str, unit: str = ""):
        self.describe, self.unit = describe, unit
        self.start_time = self.last_shown = time.monotonic()
        self.first_done: int | None = None  # a run that is resumed begins above 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.first_done = done if self.first_done is None else self.first_done
        if now - self.last_shown > 0.5 or done == total:
            self.last_shown, speed = now, (done - self.first_done) / max(now - self.start_time, 1e-9)
            remaining = f", {(total - done) / speed:.0f} s left" if speed and done < total else ""
            print_progress(f"{self.describe(done)} of {self.describe(total)}{self.unit}{remaining}", done == total)


def stderr_is_terminal() -> bool:
    """Return True if standard error exists and is a terminal."""
    return bool(sys.stderr) and sys.stderr.isatty()


def error_text(error: BaseException) -> str:
    """Return the message of an error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if error.args:
        return str(error if isinstance(error, OSError | UnicodeError) else error.args[0])
    return "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__


def reader_is_gone(stream: TextIO | None) -> bool:
    """Return True for a pipe whose reader has closed it."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # pyright: ignore[reportOptionalMemberAccess]
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False


def discard_unwritten(stream: TextIO | None) -> None:
    """Discard what a stream could not write; Python would try again at exit and print a traceback."""
    try:
        if stream:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]


def note_new_spelling(old: str, new: str) -> None:
    """Say on stderr that an option, a value or a key of a file has a new name; the old one is taken once more."""
    print(f"note: {old} is now {new}; the old spelling goes away with the next release", file=sys.stderr)
