"""The commands, run as a user runs them; those that fail or print text do so within this process."""

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from vila_triton.__main__ import build_parser, main
from vila_triton.commands import QUESTIONS
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.examples import EXAMPLES_DIR


def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vila_triton", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: its arguments and standard input -> exit code, standard output and error."""

    def run_main(*args: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vila-triton", *args])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


def test_ask_prints_the_answer_and_one_line_of_statistics():
    done = run("ask", "--image", str(EXAMPLES_DIR / "a.png"), "--device", "cpu", "How many blue shapes are there?")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"
    (line,) = done.stderr.splitlines()
    for part in ("prompt 27 tokens", "images 16 tokens", "first token", "decode_attention=aten"):
        assert part in line


def test_chat_continues_the_conversation_from_line_to_line():
    talk = f"How many blue shapes are there?\n\n/image {EXAMPLES_DIR / 'b.png'}\nHow many shapes are there?\n"
    done = run("chat", "--image", str(EXAMPLES_DIR / "a.png"), "--device", "cpu", stdin=talk)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2\n") and done.stdout.count("\n") == 2
    assert done.stderr.count("\n") == 2 and "cached" in done.stderr.splitlines()[1]


def test_ops_lists_every_op_and_why_it_is_chosen(run_here: Run):
    status, out, err = run_here("ops", "--device", "cpu", "--set", "kernels.rope=triton")
    assert status == 0, err
    assert "int4_matmul" in out and "kernels/rope.py" in out and "--set" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ask", "--image", "none.png", "Why?"], "none.png does not exist"),
        (["ask", "--model", "nowhere", "Why?"], "nowhere is not a folder"),
        (["ask", "--set", "kernels.rope=fast", "Why?"], "there are: reference, triton"),
        (["ask", "--set", "kernels.nope=triton", "Why?"], "no op 'nope'"),
        (["ask", "--set", "rope", "Why?"], "expected kernels.OP=NAME"),
        (["ask", "--emulate", "sm_80", "Why?"], "--emulate sm_80 is a GPU, and --device cpu is another device"),
        (["ask", "--top-k", "5", "Why?"], "need a --temperature"),
        (["ask", " "], "the question is empty"),
        (["ops", "--set", "kernels.rope=fast"], "there are: reference, triton"),
        (["ask", "--model", str(BUNDLED_CHECKPOINT), "<image> Why?"], "places for 1 images, but 0"),
    ],
)
def test_wrong_arguments_are_one_line_on_stderr(args: list[str], message: str, run_here: Run):
    status, _, err = run_here(*args, "--device", "cpu")
    assert status == 1 and message in err and err.count("\n") == 1


def test_unknown_gpu_cannot_be_emulated(run_here: Run):
    status, _, err = run_here("ask", "--emulate", "sm_75", "Why?")
    assert status == 1 and "no GPU 'sm_75' can be emulated, only sm_80" in err and err.count("\n") == 1


def test_gpu_cannot_be_emulated_without_bench(run_here: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bench.standin", None)  # as if it were not there
    status, _, err = run_here("ask", "--emulate", "sm_80", "Why?")
    assert status == 1 and "the emulator is in bench, which is installed with" in err and err.count("\n") == 1


def test_wrong_line_does_not_end_a_chat(run_here: Run):
    lines = ("/image none.png", "/images", f"/image {EXAMPLES_DIR / 'a.png'}", "How many blue shapes are there?")
    talk = "\n".join((*lines, "/quit", "never asked", ""))
    status, out, err = run_here("chat", "--device", "cpu", stdin=talk)
    assert status == 0 and out == "2\n"
    assert "none.png does not exist" in err and "no command '/images'" in err


OLD_AND_NEW = [
    (["ask", "--policy", "invariant", "Why?"], ["ask", "--numerics", "batch_invariant", "Why?"], 2),
    (["chat", "--policy=fast"], ["chat", "--numerics=fast"], 1),
    (["build", "m", "t", "--narrow", "8", "--format", "ours"], ["build", "m", "t", "--width-divisor", "8"], 2),
    (["convert", "s", "t", "--format", "ours"], ["convert", "s", "t", "--format", "vila-triton"], 1),
    (
        ["quantize", "s", "t", "--method", "awq", "--also", "vision_tower", "--no-propagate"],
        ["quantize", "s", "t", "--method", "awq-gptq", "--extra-parts", "vision_tower", "--no-error-propagation"],
        3,
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "notes"), OLD_AND_NEW, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_old_spelling_of_an_option_means_the_new_one_with_a_note(old, new, notes, capsys):
    assert vars(build_parser().parse_args(old)) == vars(build_parser().parse_args(new))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == notes and all(line.startswith("note: ") and " is now " in line for line in said)


def test_help_lists_every_command_by_question_and_every_option_with_a_line():
    parser = build_parser()
    (subparsers,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    text = parser.format_help()
    assert all(question in text for question in QUESTIONS)
    for name, command in subparsers.choices.items():
        assert any(line.split()[:1] == [name] for line in text.splitlines())
        assert all(action.help for action in command._actions), name
