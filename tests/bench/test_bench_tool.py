"""The tools of bench end in one line and an exit code, whoever stops them and whoever reads them."""

import ast
import io
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from processes import interruptible

import bench
from bench.__main__ import COMMANDS, listing, summary
from bench._tool import tool
from bench.correctness import repro_bundle
from bench.measure import rows
from vila_triton.console import print_progress


def source(name: str) -> str:
    return (rows.ROOT / Path(*name.split("."))).with_suffix(".py").read_text()


MODULES = [found.name for found in pkgutil.walk_packages(bench.__path__, "bench.") if not found.ispkg]
RUN = [name for name in MODULES if '\nif __name__ == "__main__":\n' in source(name)]
TOOLS = [name for name in RUN if "\ndef main(" in source(name)]  # bench.correctness shows the main of default_kernels
# They end as the module that the first runs, as the search of the second, as the process that times the third.
OTHERS = {"bench.standin.__main__", "bench.tuner.jobs", "bench.measure.vllm_engine"}


def test_every_command_has_the_tool_decorator() -> None:
    assert len(TOOLS) > 20 and set(TOOLS) > OTHERS
    for name in TOOLS:
        tree = ast.parse(source(name))
        (main,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "main")
        if name not in OTHERS:
            assert [ast.unparse(x) for x in main.decorator_list] == ["tool"], name
            assert ast.unparse(tree.body[-1]).endswith("sys.exit(main())"), name


RUN_NO_OPS = {  # or those of other libraries, what they plant themselves, or other commands of bench
    *("goals", "load_memory", "plot", "report", "roofline", "suite", "standin.__main__", "__main__"),
    *("emulator.peer_kernels", "emulator.speed", "emulator.tutorials", "peers.__main__"),
    *("measure.load_once", "measure.vllm_engine", "mutants.__main__", "ptx_mutants.__main__", "tuner.jobs"),
}


def test_every_command_that_runs_ops_takes_files_of_ones_own() -> None:
    with_option = {name.removeprefix("bench.") for name in TOOLS if "parents=[kernels_option()]" in source(name)}
    assert {name.removeprefix("bench.") for name in TOOLS} - with_option == RUN_NO_OPS


def test_python_m_bench_lists_every_command_once() -> None:
    listed = [name for names in COMMANDS.values() for name in names]
    found = {name.removeprefix("bench.").removesuffix(".__main__") for name in RUN} - {"bench"}
    inner = {name for name in found if "." in name}  # correctness.default_kernels, measure.load_once, tuner.jobs
    assert sorted(listed) == sorted(found - inner - {"__main__"})
    assert all(summary(name) for name in listed) and len(list(listing())) == len(listed) + 2 * len(COMMANDS)


def unread(main: Callable[[], int]) -> tuple[int, str]:
    """The exit code and what is on standard error, of a process whose standard output nobody reads."""
    out, err = os.pipe(), os.pipe()
    os.close(out[0])
    child = os.fork()
    if not child:
        os.dup2(out[1], 1)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w") for fd in (out[1], err[1]))
        code = 99
        try:
            code = main()
            sys.stdout.flush()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(out[1])
    os.close(err[1])
    said = os.fdopen(err[0]).read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def test_closed_pipe_while_printing_help_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sorted(set(TOOLS) - OTHERS):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        assert unread(import_module(name).main) == (141, ""), name


def test_interrupted_command_names_the_rows_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "WRITTEN_FILES", {})

    @tool
    def main(write: bool) -> None:
        if write:
            rows.write(tmp_path / "x.jsonl", [{}])
        raise KeyboardInterrupt

    assert main(False) == 130 and capsys.readouterr().err == f"{__name__}: interrupted\n"
    assert main(True) == 130
    kept = f"what was known by then is in {tmp_path / 'x.jsonl'}"
    assert capsys.readouterr().err == f"{__name__}: interrupted; {kept}\n"


def test_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    @tool
    def main() -> None:
        raise ValueError("no op x")

    assert main() == 2 and capsys.readouterr().err.endswith(": no op x\n")


def test_progress_is_printed_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        print_progress("1 of 2")
        print_progress("")
        assert stream.getvalue() == ("\r\x1b[K1 of 2\r\x1b[K" if terminal else "")
    assert not [name for name in MODULES if "\\r" in source(name).replace("\\r\\n", "")]  # no bars of their own


def test_bundles_of_one_kernel_get_different_files(tmp_path: Path) -> None:
    made = [repro_bundle.unused_path(tmp_path / "deep" / "op-mine-0.bundle").name for _ in range(3)]
    assert made == ["op-mine-0.bundle", "op-mine-0-2.bundle", "op-mine-0-3.bundle"]


def test_interrupt_during_imports_is_one_line_and_a_bug_a_traceback() -> None:
    for error, lines, code in (("KeyboardInterrupt", 1, -signal.SIGINT), ("AssertionError", 3, 1)):
        command = [sys.executable, "-c", f"import bench; raise {error}"]
        done = subprocess.run(command, cwd=rows.ROOT, capture_output=True, text=True)
        assert (len(done.stderr.splitlines()), done.returncode) == (lines, code), done.stderr


INTERRUPTED = """
import sys, time
from bench.compiler.cross_compile import run_in_subprocesses
from bench.__main__ import COMMANDS, listing, summary
from bench._tool import tool

@tool
def main():
    for _ in run_in_subprocesses(time.sleep, [0, 600, 600], 2):
        print("one", flush=True)

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.slow
def test_interrupt_while_processes_compile_is_one_line(tmp_path: Path) -> None:
    """As a terminal does it: the signal goes to the whole group, to a process that is still starting among others."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    process = interruptible(
        [sys.executable, "-m", "interrupted"],
        env={**os.environ, "PYTHONPATH": f"{rows.ROOT}:{tmp_path}"},
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == "one\n"
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted: interrupted\n" and process.returncode == 130
    with suppress(ProcessLookupError):
        while time.monotonic() - start < 30:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
