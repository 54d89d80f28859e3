"""The commands, run as a user runs them."""

import os
import subprocess
import sys

import pytest

from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.examples import EXAMPLES_DIR


def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vila_triton", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env)


def test_ask_prints_the_answer_and_one_line_about_it():
    done = run("ask", "--image", str(EXAMPLES_DIR / "a.png"), "--device", "cpu", "How many blue shapes are there?")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"
    (line,) = done.stderr.splitlines()
    for part in ("prompt 27 tokens", "images 16 tokens", "first token", "decode_attention=aten"):
        assert part in line


def test_chat_keeps_the_conversation():
    talk = f"How many blue shapes are there?\n\n/image {EXAMPLES_DIR / 'b.png'}\nHow many shapes are there?\n"
    done = run("chat", "--image", str(EXAMPLES_DIR / "a.png"), "--device", "cpu", stdin=talk)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2\n") and done.stdout.count("\n") == 2
    assert done.stderr.count("\n") == 2 and "cached" in done.stderr.splitlines()[1]


def test_ops_lists_every_op_and_why():
    done = run("ops", "--device", "cpu", "--set", "kernels.rope=triton")
    assert done.returncode == 0, done.stderr
    assert "int4_matmul" in done.stdout and "kernels/rope.py" in done.stdout and "--set" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ask", "--image", "none.png", "Why?"], "none.png does not exist"),
        (["ask", "--model", "nowhere", "Why?"], "nowhere is not a folder"),
        (["ask", "--set", "kernels.rope=fast", "Why?"], "there are: reference, triton"),
        (["ask", "--set", "kernels.nope=triton", "Why?"], "no op 'nope'"),
        (["ask", "--set", "rope", "Why?"], "expected kernels.OP=NAME"),
        (["ask", "--top-k", "5", "Why?"], "need a --temperature"),
        (["ask", " "], "the question is empty"),
        (["ops", "--set", "kernels.rope=fast"], "there are: reference, triton"),
        (["ask", "--model", str(BUNDLED_CHECKPOINT), "<image> Why?"], "places for 1 images, but 0"),
    ],
)
def test_a_wrong_call_gets_one_clear_line(args, message):
    done = run(*args, "--device", "cpu")
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_wrong_line_does_not_end_a_chat():
    talk = f"/image none.png\n/images\n/image {EXAMPLES_DIR / 'a.png'}\nHow many blue shapes are there?\n/quit\nnever asked\n"
    done = run("chat", "--device", "cpu", stdin=talk)
    assert done.returncode == 0 and done.stdout == "2\n"
    assert "none.png does not exist" in done.stderr and "no command '/images'" in done.stderr
