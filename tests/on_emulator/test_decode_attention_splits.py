"""The program that is done last merges the splits of a sequence, to the same bits in any order of blocks."""

import pytest
import torch
from test_last_arriver import FAULTS
from torch import Tensor
from vila_triton.kernels._last_arriver import arrival_counters  # pyright: ignore

from bench.correctness.error_budget import example_args
from bench.emulator import emulating
from vila_triton import ops
from vila_triton.registry import discover

discover()
TRITON = ops.decode_attention.impls["triton"]
SIZES = dict(b=4, t=300, g=1, ratio=3, d=64, l=16, dtype="bfloat16", kv="plain", numerics="fast", seed=1)
LENGTHS = [300, 0, 64, 65]  # five splits, none, one, and two


def drawn_args() -> tuple:
    """A batch whose first sequence holds the pages of all."""
    q, cache, _, scale = example_args(ops.decode_attention, **SIZES)
    cache.block_table[:] = cache.block_table[:1].clone()
    return q, cache, torch.tensor(LENGTHS, dtype=torch.int32), scale, "fast", True


def run(args: tuple, target: str, number: int, seed: int) -> tuple[Tensor, Tensor]:
    with emulating(target, seed=seed):
        return TRITON(*args, config=TRITON.configs[number])


@pytest.mark.parametrize("target, number", [("sm_90", 0), ("sm_80", len(TRITON.configs) - 1)])
def test_attention_has_the_same_bits_in_any_order_of_blocks(target: str, number: int) -> None:
    args = drawn_args()
    exact, exact_lse = ops.decode_attention.reference(*args)
    first, first_lse = run(args, target, number, 0)
    torch.testing.assert_close(first, exact, atol=0.02, rtol=0.02)
    torch.testing.assert_close(first_lse, exact_lse)
    assert not first[1].any() and first_lse[1].isneginf().all()
    for seed in range(1, 4):  # the counters are left at 0, or the next launch would merge too early
        out, lse = run(args, target, number, seed)
        assert torch.equal(out, first) and torch.equal(lse, first_lse)
    assert not arrival_counters(torch.device("cpu"), 1).any()


@pytest.mark.parametrize("fault", ["relaxed order", "barrier before it missing", "barriers after it missing"])
def test_faults_in_the_order_of_a_merge_are_found(fault: str) -> None:
    with emulating("sm_80", raise_faults=False, edit=FAULTS[fault]) as report:
        TRITON(*drawn_args(), config=TRITON.configs[-1])
    assert any("race" in x.kind for x in report.faults), report.faults
