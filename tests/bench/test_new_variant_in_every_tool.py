"""A researcher's day: one file copied, one line edited, and every tool knows the variant."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with kernels/swiglu.py copied to swiglu_mine.py and its name changed."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("vila_triton", "kernels", "bench", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    text = (ROOT / "kernels" / "swiglu.py").read_text()
    (copy / "kernels" / "swiglu_mine.py").write_text(text.replace('impl("triton"', 'impl("mine"'))
    return copy


@pytest.mark.parametrize(
    "command, expected",
    [
        ("check swiglu --impl mine --examples 5", "swiglu mine, config 0"),
        ("inspect swiglu --impl mine --config 0 --arch sm_90", "mine 0 sm_90"),
        ("ops swiglu --case toy --budget 0.01", "  mine 1024"),
        ("tune swiglu --impl mine --case toy --timer cost-model --minutes 1 --out tuned", "swiglu mine on"),
        ("shadow --op swiglu --impl mine --count 1 --tokens 1", "swiglu: mine beside aten"),
        ("recompiles swiglu", "swiglu mine"),
    ],
    ids=lambda text: text.split()[0],
)
def test_copied_kernel_is_in_every_command(command: str, expected: str, checkout: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *f"bench.{command}".split()], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
