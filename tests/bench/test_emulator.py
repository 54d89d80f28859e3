"""The tests of compiled kernels pass, which the emulator runs: tests/on_emulator, in a process that interprets none."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "on_emulator"


def test_compiled_kernels_pass_their_tests_in_the_emulator() -> None:
    options = ["-q", "-n", "2", "--durations", "0", "-p", "no:cacheprovider", "--confcutdir", str(FOLDER)]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET" and "PYTEST" not in key}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options, str(FOLDER)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", done.stdout, re.MULTILINE), done.stdout
