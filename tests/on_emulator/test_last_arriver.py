"""The program that arrives last adds up what all wrote to the same bits in any order; faults in the order are found."""

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from vila_triton.kernels._last_arriver import arrival_counters, arrives_last  # pyright: ignore

from bench.correctness.error_budget import example_args
from bench.emulator import emulating
from bench.emulator.report import Report
from vila_triton.ops import int4_matmul
from vila_triton.registry import discover

TILES, SPLITS, BLOCK = 3, 5, 256


@triton.jit
def sum_splits_kernel(x_ptr, parts_ptr, out_ptr, counters_ptr, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [N] = the sum of the squares of x [SPLITS, N], of which each program squares a part."""
    tile, split = tl.program_id(0), tl.program_id(1)
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + split * N + offs)
    tl.store(parts_ptr + split * N + offs, x * x)
    if arrives_last(counters_ptr + tile, SPLITS):
        acc = tl.zeros([BLOCK], tl.float32)
        for other in range(SPLITS):
            acc += tl.load(parts_ptr + other * N + (2 * tile + 1) * BLOCK - 1 - offs)  # what other threads stored
        tl.store(out_ptr + offs, acc)


def sum_splits(x: Tensor, **options: object) -> tuple[Tensor, Tensor, Report]:
    """The sums, the counters after the launch, and what the emulator found."""
    parts, out = torch.full_like(x, torch.nan), torch.empty_like(x[0])
    counters = torch.zeros(TILES, dtype=torch.int32)
    with emulating("sm_90", raise_faults=False, **options) as report:  # pyright: ignore
        sum_splits_kernel[TILES, SPLITS](x, parts, out, counters, x.shape[1], SPLITS=SPLITS, BLOCK=BLOCK)
    return out, counters, report


def expected_sums(x: Tensor) -> Tensor:
    squares = (x * x).view(SPLITS, TILES, BLOCK).flip(-1).view_as(x)
    total = torch.zeros_like(x[0])
    for part in squares:
        total += part
    return total


def random_parts() -> Tensor:
    return torch.randn(SPLITS, TILES * BLOCK, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(8))
def test_sums_have_the_same_bits_in_any_order_of_blocks(seed: int) -> None:
    x = random_parts()
    out, counters, report = sum_splits(x, seed=seed)
    assert not report.faults and not counters.any()
    assert torch.equal(out, expected_sums(x))


def without_barriers(ptx: str, before: bool) -> str:
    """The PTX without the last barrier before the count, or without those after it."""
    head, atom, tail = ptx.partition("atom.")
    if before:
        start = head.rindex("bar.sync")
        return head[:start] + head[head.index(";", start) + 1 :] + atom + tail
    return head + atom + re.sub(r"bar\.sync\s+0;", "", tail)


FAULTS: dict[str, Callable[[str], str]] = {
    "relaxed order": lambda ptx: ptx.replace(".gpu.acq_rel.", ".gpu.relaxed."),
    "release without acquire": lambda ptx: ptx.replace(".gpu.acq_rel.", ".gpu.release."),
    "acquire without release": lambda ptx: ptx.replace(".gpu.acq_rel.", ".gpu.acquire."),
    "order of the block only": lambda ptx: ptx.replace(".gpu.acq_rel.", ".cta.acq_rel."),
    "barrier before it missing": lambda ptx: without_barriers(ptx, before=True),
    "barriers after it missing": lambda ptx: without_barriers(ptx, before=False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_order_are_found(fault: str) -> None:
    changed: list[bool] = []

    def plant(ptx: str) -> str:
        changed.append(FAULTS[fault](ptx) != ptx)
        return FAULTS[fault](ptx)

    _, _, report = sum_splits(random_parts(), edit=plant)
    assert changed == [True]
    assert any("race" in x.kind for x in report.faults), report.faults


def test_a_counter_that_is_not_reset_is_seen_after_the_launch() -> None:
    def plant(ptx: str) -> str:
        end = ptx.index("atom.")
        return ptx[:end] + re.sub(r"@\S+\s+st\.global\.b32[^;]*;", "", ptx[end:], count=1)

    x = random_parts()
    _, counters, _ = sum_splits(x, edit=plant)
    assert counters.tolist() == [SPLITS] * TILES


def test_arrays_grow_and_are_kept() -> None:
    device = torch.device("cpu")
    few = arrival_counters(device, 3)
    many = arrival_counters(device, few.numel() + 1)
    assert many.numel() > few.numel() and many.dtype == torch.int32
    assert arrival_counters(device, 3) is many and arrival_counters(device, many.numel()) is many


def test_products_have_the_same_bits_in_any_order_of_blocks() -> None:
    discover()
    impl = int4_matmul.impls["splitk"]
    args = example_args(
        int4_matmul, 0, m=3, n=80, G=4, group=128, dtype="bfloat16", order="sub", bias=True, residual=True
    )
    found = []
    for seed in range(3):
        with emulating("sm_90", seed=seed):
            found.append(impl(*args, config={**impl.configs[1], "SPLIT_K": 4}))
    assert found[0].isfinite().all() and all(torch.equal(x, found[0]) for x in found)
    assert not arrival_counters(torch.device("cpu"), 1).any()
