"""An op for the tests of the tuner, x + x: its implementation can be wrong, kill a process, or never end."""

import importlib.util
import sys
from pathlib import Path

import pytest

from vila_triton.registry import OPS, Op, discover

TOY = '''
"""x + x. With wrong=True it is off by one; the first call with BLOCK 8 kills what the file $VICTIM says; with BLOCK 16
it makes the file $HANGING, if there is such a variable, and never ends.
"""
import os
import signal
import time
from pathlib import Path

import torch

from vila_triton.registry import IntRange, OneOf, op
from vila_triton.registry.search_space import LaunchCost, SearchSpace


@op
def doubled(x):
    return x + x


@doubled.example_inputs
def _(m: IntRange(1, 40), n: IntRange(1, 8), dtype: OneOf("float32"), *, rng, device):
    return (torch.randn(m, n, generator=rng).to(device),)


@doubled.flops_and_bytes
def _(m, n, dtype):
    return m * n, 8 * m * n


@doubled.sizes_from_args("m")
def _(x):
    return {"m": len(x), "n": x.shape[1], "dtype": "float32"}


SPACE = SearchSpace(
    {"BLOCK": [1, 2, 4, 8, 16, 32, 64], "wrong": [False, True]},
    is_valid=lambda config, m, **_: config["BLOCK"] <= 2 * m,
    launch_cost=lambda config, m, n, dtype: LaunchCost(
        -(-m // config["BLOCK"]), 8 * n, 4 * n, elementwise_ops=10**6 * config["BLOCK"]
    ),
)
ran = []


@doubled.impl("blocks", configs=[{"BLOCK": 1, "wrong": False}], space=SPACE)
def doubled_blocks(x, *, BLOCK, wrong):
    ran.append(BLOCK)
    victim = Path(os.environ.get("VICTIM", "/nowhere"))
    if BLOCK == 8 and victim.exists():
        pid = os.getppid() if victim.read_text() == "parent" else os.getpid()
        victim.unlink()
        os.kill(pid, signal.SIGKILL)
    if BLOCK == 16 and "HANGING" in os.environ:
        Path(os.environ["HANGING"]).touch()
        time.sleep(600)
    return 2 * x + wrong
'''


def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Op:
    """The op of TOY, in a file of its own, forgotten after the test."""
    file = tmp_path / "kernels" / "doubled.py"
    file.parent.mkdir()
    file.write_text(TOY)
    discover()
    monkeypatch.setitem(OPS, "doubled", None)  # what is there before is there after
    spec = importlib.util.spec_from_file_location("toy_doubled", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy_doubled", module)
    spec.loader.exec_module(module)
    return OPS["doubled"]
