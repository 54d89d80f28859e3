"""Every command and snippet of the documents is run, and its output compared with the one they show, numbers aside.

A fenced block is one of
    console   commands after "$ ", each followed by its output (stdout and stderr)
    bash      commands that succeed, with any output
    python    a part of a program: all Python blocks of a document are run in order, in one namespace. A comment behind
              a `print(...)` is its output, as is "prints ..." in a comment behind anything else
    text      anything that is not run
A console or bash block runs by itself, in a fresh copy of the repository. "# exit code 1" behind a command says that it
does not succeed. A `pytest` command is collected, not run: it selects at least one test. The comment before a block
names its lane:
    <!-- slow -->      run by `pytest -m slow`
    <!-- real -->      the same, where the extra `real` is installed
    <!-- .ci/run -->   run by that script, which holds the block's commands
    <!-- vllm -->      the same, inside vLLM, where it is installed: by tests/vllm_plugin/test_shown_requests.py
    <!-- by hand -->   installs software, takes long or wants a quiet machine, or is a script of `.ci`
    <!-- file NAME -->   of a python block: a file of that name, which the document's commands find
", with OPTIONS" behind the lane is appended to the block's last command, to make it shorter.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, Block, blocks, is_shown, name, without_numbers

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
MARKS = {"": [], "slow": [pytest.mark.slow], "real": [pytest.mark.slow, pytest.mark.real]}
FILE = "file "  # begins the lane of a block that is a file
BY_HAND = (
    r"pip install |python3\.11 -m venv |\. \.venv|coverage |\.ci/|"
    r"python -m bench\.(model .*--vllm|training|serve|mutants|ptx_mutants|compiled_check|emulator\.speed)"
)
COMMANDS = {  # in front of PATH: those of this environment, and `pytest` without running a test
    "python": 'exec {python} "$@"',
    "vila-triton": 'exec {python} -m vila_triton "$@"',
    "pytest": 'exec {python} -m pytest -q --collect-only "$@"',
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of all files of the repository but those that git ignores, to run commands in."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    copy = tmp_path / "checkout"
    if listed.returncode:  # no repository: a source distribution
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in filter(None, listed.stdout.split("\0")):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell in which this environment's commands come first."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for command, line in COMMANDS.items():
        (bin / command).write_text(f"#!/bin/sh\n{line.format(python=sys.executable)}\n")
        (bin / command).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return {**env, "PATH": f"{bin}{os.pathsep}{env['PATH']}", "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{name(block.document)}:{block.line}", marks=MARKS[block.lane])
        for block in BLOCKS
        if block.language in ("console", "bash") and block.lane in MARKS
    ],
)
def test_commands_print_what_the_document_shows(block: Block, checkout: Path, environment: dict[str, str]) -> None:
    if block.lane == "real":
        pytest.importorskip("gguf")
    for other in blocks(block.document):
        if other.lane.startswith(FILE):
            (checkout / other.lane.removeprefix(FILE)).write_text(other.body)
    for command, shown in block.commands():
        done = subprocess.run(
            ["bash", "-ec", f"{command.rstrip()} {block.options}"],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        code = re.search(r"# exit code (\d+)$", command, re.M)
        assert done.returncode == (int(code[1]) if code else 0), f"{command}\n{done.stdout}"
        if block.language == "console":
            printed = re.sub(r"^\[transformers\] .*\n", "", done.stdout, flags=re.M)  # its warnings differ by version
            compared = f"{without_numbers(printed)}\nand not\n\n{without_numbers(shown)}"
            assert is_shown(shown, printed), f"{command}\n{compared}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_python_snippets_print_what_the_document_shows(
    document: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "\n".join(block.body for block in blocks(document) if block.language == "python" and not block.lane)
    monkeypatch.chdir(checkout)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program, name(document), "exec"), {"__name__": "snippet"})
    shown = "\n".join(re.findall(r"(?:^\s*print\(.*\)  # |  # prints )(.*)$", program, re.M))
    assert without_numbers(printed.getvalue()) == without_numbers(shown)


def test_blocks_of_other_lanes_stand_in_their_scripts() -> None:
    for block in BLOCKS:
        if block.lane.startswith(FILE):
            assert block.language == "python"
            continue
        lines = re.sub(r"\\\n\s*", "", block.body).splitlines()
        commands = [c for line in lines for c in re.sub(r"\s+#.*", "", line).split(" && ")]
        if block.lane == "by hand":
            assert all(re.match(BY_HAND, command) for command in commands)
        elif block.lane != "vllm" and block.lane not in MARKS:
            script = (ROOT / block.lane).read_text().replace(" -q ", " ")
            missing = [command for command in commands if command not in script]
            assert not missing, f"{name(block.document)}:{block.line}: {block.lane} does not run {missing}"


def test_blocks_have_a_language() -> None:
    assert {block.language for block in BLOCKS} <= {"console", "bash", "python", "text"}
    assert not [block for block in BLOCKS if block.language == "text" and re.search(r"^\$ ", block.body, re.M)]
