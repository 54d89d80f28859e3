"""The waste of a kernel is counted, and ranks it behind its clean twin where the cost model is the timer."""

import sys
from collections.abc import Iterator, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from math import inf
from pathlib import Path

import pytest
import torch

from bench.compiler.cross_compile import CompileRequest
from bench.emulator import emulating
from bench.emulator.counters.emulated_call import emulate_call
from bench.emulator.counters.sums import executed_instructions, memory_traffic
from bench.measure.cases import Case
from bench.tuner import cost_model, search
from bench.tuner.jobs import STAGES, Answer, Job, run_job
from vila_triton.registry import OPS, Op, discover

SIZE = 1024
CLEAN = {"SPREAD": False, "CONFLICT": False, "num_warps": 4}
UNCOALESCED = CLEAN | {"SPREAD": True}
CONFLICTED = CLEAN | {"CONFLICT": True}
KERNEL = '''
"""x + x in blocks of 1024. SPREAD lets neighbouring threads load and store numbers 32 apart; CONFLICT lets them read
numbers 32 apart from shared memory, and put them back.
"""
import torch
import triton
import triton.language as tl

from vila_triton.registry import IntRange, OneOf, op
from vila_triton.registry.search_space import LaunchCost, SearchSpace


@op
def twice(x):
    return x + x


@twice.example_inputs
def _(blocks: IntRange(1, 4), dtype: OneOf("float32"), *, rng, device):
    return (torch.randn(1024 * blocks, generator=rng).to(device),)


@twice.flops_and_bytes
def _(blocks, dtype):
    return 1024 * blocks, 8192 * blocks


@twice.sizes_from_args("blocks")
def _(x):
    return {"blocks": len(x) // 1024, "dtype": "float32"}


@triton.jit
def _twice_kernel(x_ptr, out_ptr, SPREAD: tl.constexpr, CONFLICT: tl.constexpr):
    lanes = tl.arange(0, 1024)
    transposed = lanes % 32 * 32 + lanes // 32
    offs = tl.program_id(0) * 1024 + (transposed if SPREAD else lanes)
    x = tl.load(x_ptr + offs)
    order = transposed if CONFLICT else 1023 - lanes
    x = tl.gather(tl.gather(x, order, 0), order, 0)
    tl.store(out_ptr + offs, x + x)


SPACE = SearchSpace(
    {"SPREAD": [True, False], "CONFLICT": [True, False], "num_warps": [4]},
    launch_cost=lambda config, blocks, dtype: LaunchCost(blocks, bytes=8192, bytes_per_stage=4096),
)


@twice.impl("blocks", configs=[{"SPREAD": True, "CONFLICT": True, "num_warps": 4}], space=SPACE)
def twice_blocks(x, *, SPREAD, CONFLICT, num_warps):
    out = torch.empty_like(x)
    _twice_kernel[(len(x) // 1024,)](x, out, SPREAD=SPREAD, CONFLICT=CONFLICT, num_warps=num_warps)
    return out
'''


class Inline:
    """Does jobs here and now."""

    num_workers = 2

    def run(self, stage: str, jobs: Sequence[Job], deadline: float = inf) -> Iterator[tuple[int, Answer]]:
        yield from enumerate(map(run_job, jobs))

    def close(self) -> None:
        pass


@pytest.fixture
def twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Op:
    """The op of KERNEL, in a file of its own, forgotten after the test."""
    file = tmp_path / "twice.py"
    file.write_text(KERNEL)
    discover()
    monkeypatch.setitem(OPS, "twice", None)  # what is there before is there after
    spec = spec_from_file_location("toy_twice", file)
    assert spec and spec.loader
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy_twice", module)
    spec.loader.exec_module(module)
    return module.twice


def wasted(op: Op, config: dict) -> float:
    """Seconds that an H100 loses with this config, of a call with 1,000 blocks."""
    counts = STAGES["emulate"]({"op": op.name, "impl": "blocks", "config": config, "arch": "sm_90", "sizes": sizes(2)})
    assert counts["reason"] is None
    gpu = cost_model.gpu_of_arch("sm_90")
    return cost_model.wasted_seconds(op.impls["blocks"], config, sizes(1000), sizes(2), counts, gpu)


def sizes(blocks: int) -> dict:
    return {"blocks": blocks, "dtype": "float32"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_sectors_and_wavefronts_are_those_of_the_addresses(twice: Op, target: str) -> None:
    """32 floats side by side lie in 4 sectors, 32 apart in 32. Threads hold four floats side by side or one, so where
    they read words 32 apart, 8 or 32 of an access lie in one bank.
    """
    x = torch.arange(SIZE, dtype=torch.float32)
    for config, sectors, wavefronts in ((CLEAN, 1, {1}), (UNCOALESCED, 8, {1}), (CONFLICTED, 1, {8, 32})):
        with emulating(target) as report:
            assert torch.equal(twice.impls["blocks"](x, config=config), 2 * x)
        executed = executed_instructions(report.launches[0])
        total = memory_traffic(executed)
        assert total.sectors == sectors * total.fewest_sectors == sectors * 2 * 4 * SIZE // 32
        assert (total.read_bytes, total.written_bytes) == (sectors * 4 * SIZE, sectors * 4 * SIZE)
        reads = [x for x in executed if x.accesses and not x.is_store]
        assert {x.wavefronts / x.accesses for x in reads} == wavefronts


def test_uncoalesced_and_conflicted_configs_waste_time(twice: Op) -> None:
    assert wasted(twice, CLEAN) == 0
    assert wasted(twice, UNCOALESCED) > 0 and wasted(twice, CONFLICTED) > 0
    assert wasted(twice, UNCOALESCED | {"CONFLICT": True}) > wasted(twice, CONFLICTED)


@pytest.mark.parametrize("worse_than", [1.1, 100.0])
def test_clean_config_ranks_first_by_cost_model(
    worse_than: float, twice: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declared costs are the same for all, and the file's own config wastes most; of the others none is gated."""
    monkeypatch.setitem(STAGES, "compile", lambda job: {"reason": None})
    gated = list[dict]()
    monkeypatch.setitem(STAGES, "gate", lambda job: gated.append(job["config"]) or {"reason": None})
    gpu = cost_model.gpu_of_arch("sm_90")
    stamp = {"device": gpu.name, "date": "2026-01-01", "commit": "abc", "torch": "2"}
    plan = search.SearchPlan(search.COST_MODEL, gpu.name, gpu, worse_than, 0.01, stamp)
    looked = search.Search(twice.impls["blocks"], [Case("twice", "toy", sizes(1000))], plan, tmp_path / "out")
    assert len({seconds for c in looked.candidates for _, seconds in c.timed_sizes}) == 1
    looked.run(Inline(), inf, lambda: None)
    assert gated == [CLEAN] and looked.num_done == len(looked.candidates) == 4
    told = sorted(looked.journal.entries["tune"].values(), key=lambda row: row["predicted"])
    assert told[0]["config"] == CLEAN and len({row["predicted"] for row in told}) == 4
    others = ["cost", "cost", "predicted"] if worse_than < 2 else ["predicted"] * 3  # the file's own config is kept
    assert [row["status"] for row in told] == ["timed", *others]


def test_emulated_call_counts_what_the_op_needs(twice: Op) -> None:
    result = emulate_call(CompileRequest("twice", "blocks", CLEAN, "sm_90", sizes(2)))
    (row,) = result.kernels
    assert (row["unit"], row["units"], row["grid"]) == ("element", 2 * SIZE, [2, 1, 1])
    assert row["read_bytes"] + row["written_bytes"] == row["op_bytes"] and not row["tensor_flops"]
    assert sum(row["kinds"].values()) == row["instructions"] == sum(sum(x.values()) for x in row["lines"].values())
