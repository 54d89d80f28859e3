"""Times are given to what is right, and say what they rest on."""

import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ops
from bench.measure import rows, timing
from bench.measure.cases import Case, cases, size_combinations
from vila_triton.registry import OPS, discover

discover()
CPU = torch.device("cpu")
CEILINGS = timing.MachinePeaks(1e9, {"float32": 1e12})


@pytest.fixture
def swiglu(monkeypatch: pytest.MonkeyPatch):
    """The op swiglu with two more implementations, one of them wrong in its last column."""
    op = OPS["swiglu"]
    monkeypatch.setattr(op, "impls", dict(op.impls))

    def wrong(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out = op.reference(gate, up)
        out[..., -1] *= 1.01
        return out

    op.impl("wrong")(wrong)
    op.impl("copy")(lambda gate, up: op.reference(gate, up))
    return op


def test_wrong_implementation_gets_no_time_and_right_one_a_whole_row(swiglu: object) -> None:
    (case,) = ops.select_cases(["swiglu"], "toy", "float32", CPU)
    found = {row["impl"]: row for row in ops.time_cases([case], [], False, CPU, CEILINGS, budget=0.01)}
    assert {"reference", "aten", "triton", "wrong", "copy"} <= set(found)
    assert found["wrong"]["kind"] == "refused" and "elements are off" in found["wrong"]["reason"]
    assert found["triton"]["kind"] == "refused" and "interpreter" in found["triton"]["reason"]
    row = found["copy"]
    flops, size = case.cost
    assert row["kind"] == "op" and row["low"] <= row["seconds"] <= row["high"] and row["samples"] >= 5
    assert row["flops_share"] == pytest.approx(flops / row["seconds"] / 1e12)
    assert row["bytes_share"] == pytest.approx(size / row["seconds"] / 1e9)
    assert row["noise"] == pytest.approx(abs(row["again"] - row["seconds"]) / row["seconds"])
    assert set(rows.stamp(CPU)) <= set(row)
    assert json.loads(json.dumps(row)) == row
    for row in found.values():
        assert row["impl"] in ops.format_row(row, found["reference"])


def test_time_above_a_peak_is_an_error_unless_the_cache_is_warm(
    swiglu: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An implementation that remembers its outputs, which no gate has seen; beside one as fast as the ceiling."""
    (case,) = ops.select_cases(["swiglu"], "toy", "float32", CPU)
    _, size = case.cost

    def figure(call: Any, *rest: object) -> timing.Timing:
        seconds = 1e-9 if is_copy(call) else size / CEILINGS.bandwidth / 1.05
        return timing.Timing(seconds, seconds, seconds, 1.06 * seconds, 5, cold, False)

    monkeypatch.setattr(ops, "time_call", figure)
    monkeypatch.setattr(ops, "measure_peaks", lambda *_: CEILINGS)
    options = ["swiglu", "--case", "toy", "--impl", "copy", "--impl", "aten", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["bench.ops", *options])
    share = f"impossible: {size / 1e-9 / CEILINGS.bandwidth:.0%} of the bandwidth"
    for cold, status in ((True, 1), (False, 0)):
        found = list(ops.time_cases([case], ["aten", "copy"], False, CPU, CEILINGS, 0.01, lambda *_: None))
        assert {row["impl"]: row["kind"] for row in found} == {"aten": "op", "copy": "refused" if cold else "op"}
        assert ops.main() == status
        assert (share in capsys.readouterr().out) == cold


def test_implementation_out_of_memory_gets_a_row_and_the_others_times(
    swiglu: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the timing, and while its arguments are drawn."""

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    (case,) = ops.select_cases(["swiglu"], "toy", "float32", CPU)
    whole = ops.time_call
    monkeypatch.setattr(
        ops, "time_call", lambda call, args, *rest: (full if is_copy(call) else whole)(call, args, *rest)
    )
    found = list(ops.time_cases([case], ["copy", "aten"], False, CPU, CEILINGS, 0.01, lambda *_: None))
    assert {row["impl"]: row["kind"] for row in found} == {"aten": "op", "copy": "refused"}
    assert found[-1]["reason"] == "OutOfMemoryError: CUDA out of memory"
    monkeypatch.setattr(ops, "random_arguments", full)
    found = list(ops.time_cases([case], ["copy", "aten"], False, CPU, CEILINGS, 0.01, lambda *_: None))
    assert [row["kind"] for row in found] == ["refused", "refused"]


def is_copy(call: Any) -> bool:
    """Return True if a timed call is of the implementation "copy"."""
    return inspect.getclosurevars(call).nonlocals["impl"].name == "copy"


def test_default_implementation_is_timed_marked_and_gated(swiglu: object) -> None:
    (case,) = ops.select_cases(["swiglu"], "toy", "float32", CPU)
    gate = ops.GATES["case"]
    found = list(ops.time_cases([case], ["wrong", "copy"], False, CPU, CEILINGS, 0.01, gate, include_default=True))
    assert [(row["impl"], row["served"]) for row in found] == [("aten", True), ("wrong", False), ("copy", False)]
    assert [row["kind"] for row in found] == ["op", "refused", "op"] and "elements are off" in found[1]["reason"]


def test_copies_of_args_overflow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    x = torch.ones(100)  # 400 bytes
    copies, cold = timing.copies_of_args((x,), CPU)
    assert cold and len(copies) == 6 and len({c[0].data_ptr() for c in copies}) == 6
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 10**6)
    copies, cold = timing.copies_of_args((x,), CPU)
    assert not cold and len(copies) == timing.MOST_COPIES


def test_time_call_measures_a_known_duration() -> None:
    found = timing.time_call(lambda x: time.sleep(0.01), (torch.ones(1),), CPU, budget=0.02)
    assert 0.01 <= found.low <= found.seconds <= found.high and found.again >= 0.01 and found.samples >= 5


def test_cases_are_all_combinations_and_unknown_names_are_errors() -> None:
    (first, *rest) = cases("int4_matmul", "decode")
    assert first.sizes == {
        **{"m": 1, "n": 4096, "G": 32, "group": 128, "dtype": "float16"},
        **{"order": "sub", "bias": False, "residual": False},  # of what is no number the first, the simplest
    }
    assert len(rest) == 14
    op = OPS["int4_matmul"]
    found = list(size_combinations({"m": [1, 2], "n-G": [[8, 1], [16, 2]]}, op))
    assert [(s["m"], s["n"], s["G"]) for s in found] == [(1, 8, 1), (1, 16, 2), (2, 8, 1), (2, 16, 2)]
    with pytest.raises(ValueError, match="int4_matmul has no size k; it has m, n, G, group, dtype"):
        list(size_combinations({"k": 1}, op))
    with pytest.raises(ValueError, match="no case 'fast'; there are: decode, prefill, goals, models, toy"):
        cases("int4_matmul", "fast")


def test_rows_round_trip_and_broken_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows.write(file, [{"kind": "op", "x": 1}, {"kind": "ceiling", "x": 2}])
    rows.write(file, [{"kind": "op", "x": 3}])
    assert [row["x"] for row in rows.read(file)] == [1, 2, 3]
    assert [row["x"] for row in rows.read(file, kind="op")] == [1, 3]
    file.write_text(file.read_text() + '{"kind": "op", "x"\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:4 is not a row"):
        list(rows.read(file))


def test_ops_unknown_names_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["nothing"], "no op 'nothing'; there are: "),
        (["swiglu", "--impl", "x"], "no implementation x; there are: "),
        (["swiglu", "--case", "x"], "swiglu has no case 'x'"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench.ops", *wrong])
        assert ops.main() == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1


def test_mean_cost_of_a_ragged_batch_counts_what_it_reads() -> None:
    sizes = {"b": 3, "t": 100, "g": 2, "ratio": 4, "d": 64, "l": 16, "dtype": "float16"}
    case = Case("decode_attention", "ragged", sizes)
    args = ops.random_arguments(case, torch.device("cpu"))
    total = int(args[2].sum())
    assert 100 < total < 300
    flops, size = ops.mean_cost(case, args)
    assert size == pytest.approx(2 * (2 * total + 4 * 2 * 3) * 64 * 2)  # keys and values; q and the result
    assert flops == pytest.approx(4 * total * 2 * 4 * 64)
    whole = cases("linear")[0]
    assert ops.mean_cost(whole, (None, None, None)) == whole.cost
