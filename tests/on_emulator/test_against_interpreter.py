"""Kernels compute compiled what they compute interpreted, in both dtypes that the interpreter has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted_outputs import calls, outputs_of
from torch import Tensor

from bench.correctness.error_budget import (
    Example,
    conditioning,
    float64_reference,
    freedom_of_order,
    one_rounding,
)
from bench.emulator import emulating

CALLS = {name: (impl, example) for name, impl, example in calls()}
TARGETS = {name: ("sm_80", "sm_90")[i // 2 % 2] for i, name in enumerate(CALLS)}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """The outputs of all calls interpreted, from a process that interprets every kernel."""
    file = tmp_path_factory.mktemp("interpreted") / "outputs.pt"
    script, root = Path(__file__).with_name("interpreted_outputs.py"), Path(__file__).parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, str(script), str(file)], env=env, check=True)
    return torch.load(file)


def roundings(example: Example, outputs: list[Tensor]) -> list[Tensor]:
    """One rounding of each input, as far as it moves an output, and of the output; and freedom to sum in any order."""
    op = example.op
    exact = float64_reference(op, example.args)
    moves = conditioning(op, example.args, exact, torch.Generator().manual_seed(0))
    return [
        move + one_rounding(want, out.dtype) + freedom_of_order(example.args, move, out.dtype)
        for want, move, out in zip(exact, moves, outputs)
    ]


@pytest.mark.parametrize("name", CALLS)
def test_emulated_kernels_compute_what_interpreted_ones_do(name: str, interpreted: dict[str, list[Tensor]]) -> None:
    impl, example = CALLS[name]
    with emulating(TARGETS[name]):
        outputs = outputs_of(impl, example)
    want = interpreted[name]
    assert [x.shape for x in outputs] == [x.shape for x in want]
    bounds = [] if example.op.bitwise_exact else roundings(example, outputs)
    for out, other, bound in zip(outputs, want, bounds):  # either may be off by that much
        assert ((out.double() - other.double()).abs() <= 2 * bound).all()
    for out, other in zip(outputs[len(bounds) :], want[len(bounds) :], strict=True):
        assert torch.equal(out.nan_to_num(), other.nan_to_num())
