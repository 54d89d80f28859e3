"""How a command ends: an error in one line, an exit code as shells know it, and no traceback for what is no bug."""

import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141  # the last two: 128 and the number of the signal
CLEAR_LINE = "\r\033[K"  # a terminal's line
EXPECTED_ERRORS = (OSError, ValueError, KeyError, RuntimeError, MemoryError)  # what our errors are


def exit_code(name: str, run: Callable[[], int | None], failure_code: int = EXIT_FAILED) -> int:
    """Run a command of this name, its parsing of arguments included -> what to hand to `sys.exit`.

    An expected error is said in one line on standard error and is the code `failed`. Ctrl-C and a reader that has gone
    (`| head`) end it too.
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
    """Say in one line on standard error what is wrong."""
    with suppress(OSError):
        print(f"{CLEAR_LINE if stderr_is_terminal() else ''}{name}: {error_text(error)}", file=sys.stderr, flush=True)


def print_progress(text: str, is_last: bool = False) -> None:
    """How far something is: on a terminal a line that the next takes the place of, but for the last; else nothing.
    Without text the line is empty.
    """
    if stderr_is_terminal():
        print(f"{CLEAR_LINE}{text}", end="\n" if is_last else "", file=sys.stderr, flush=True)


def stderr_is_terminal() -> bool:
    return bool(sys.stderr) and sys.stderr.isatty()


def error_text(error: BaseException) -> str:
    """What an error says of itself, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if error.args:
        return str(error if isinstance(error, OSError | UnicodeError) else error.args[0])
    return "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__


def reader_is_gone(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # pyright: ignore[reportOptionalMemberAccess]
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False


def discard_unwritten(stream: TextIO | None) -> None:
    """Let go of what a stream could not write: Python would try once more at its exit, and complain."""
    try:
        if stream:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]
