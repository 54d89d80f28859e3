"""Commands end in one line and an exit code, without a traceback, whatever happens to their streams."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import interruptible

ENDS = """
import sys
from vila_triton.console import exit_code

def run():
    {}

sys.exit(exit_code("tool", run))
"""


def shell(code: str, redirected: str, *python: str) -> subprocess.CompletedProcess[str]:
    """A command that does `code`, in a shell that redirects; its exit code is the last line of standard error."""
    line = f'"$0" "$@" {redirected}; echo "${{PIPESTATUS[0]}}" >&2'
    command = ["bash", "-c", line, sys.executable, *python, "-c", ENDS.format(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("code", "said", "status"),
    [
        ("pass", "", 0),
        ("return 3", "", 3),
        ("raise ValueError('x is 0')", "tool: x is 0\n", 1),
        ("raise KeyError('no op x')", "tool: no op x\n", 1),
        ("open('/nowhere/x')", "tool: /nowhere/x: No such file or directory\n", 1),
        ("raise MemoryError", "tool: MemoryError\n", 1),
        ("raise KeyboardInterrupt", "tool: interrupted\n", 130),
        ("raise KeyboardInterrupt('kept in x')", "tool: kept in x\n", 130),
        ("sys.exit(2)", "", 2),
    ],
)
def test_exit_code_and_one_line_for_every_kind_of_end(code: str, said: str, status: int) -> None:
    assert shell(code, "").stderr == f"{said}{status}\n"


@pytest.mark.parametrize("python", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("code", "redirected", "said"),
    [
        ("sys.stdin.read(1); print('x' * 100000)", "< <(sleep 0.3; echo) | true", "141\n"),
        ("sys.stdin.read(1); print('x')", "< <(sleep 0.3; echo) | true", "141\n"),
        ("sys.stdin.read(1); print('x', file=sys.stderr)", "< <(sleep 0.3; echo) 2>&1 | true", "141\n"),
        ("sys.stdin.read(1); raise ValueError('a reason')", "< <(sleep 0.3; echo) | true", "tool: a reason\n1\n"),
        ("import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')", "| cat", "tool: Broken pipe\n1\n"),
        ("print('x')", "> /dev/full", "tool: No space left on device\n1\n"),
        ("print('x')", ">&-", "0\n"),
        ("raise ValueError", "2> /dev/full", "1\n"),
    ],
)
def test_closed_pipe_and_full_disk_end_without_a_traceback(
    code: str, redirected: str, said: str, python: tuple[str, ...]
) -> None:
    assert shell(code, redirected, *python).stderr == said


def test_interrupted_command_says_so_in_one_line() -> None:
    code = ENDS.format("import time; print('begun', flush=True); time.sleep(60)")
    process = interruptible([sys.executable, "-c", code])
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "tool: interrupted\n" and process.returncode == 130
