"""Goals are met or not by the rows alone, and say so where rows are missing; errors are those of the arithmetic."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import accuracy, goals
from bench.correctness.error_budget import example_args, float64_reference
from bench.measure import rows
from vila_triton.registry import OPS, Impl, discover

discover()


def row(impl: str, seconds: float | None, m: int = 1, served: bool = False, case: str = "goals") -> dict[str, Any]:
    """As bench.ops writes it; no seconds: refused."""
    sizes = {"m": m, "n": 8192, "G": 64, "group": 128, "dtype": "float16"}
    about = {"op": "int4_matmul", "impl": impl, "case": case, "sizes": sizes, "config": {}, "served": served}
    about |= {"device": "a GPU", "kind": "refused"}
    shares = {"bytes_share": 0.5, "flops_share": 0.1}
    return about | ({} if seconds is None else {"kind": "op", "seconds": seconds, **shares})


def said(*found: dict[str, Any]) -> list[str]:
    return [line for line in goals.report_goals(goals.measured_points(found)) if line.startswith("goal")]


def test_goal_is_met_if_met_at_every_point() -> None:
    ours, dense, dequant = row("gemv", 1.0, served=True), row("dense", 2.5), row("dequant", 4.0)
    peer = row("gemlite", 1.1)
    decode, floor, beside = said(ours, dense, dequant, peer)
    assert decode == "goal decode: MET: 1 of 1 points reach 2.2; the least is 2.50 at m=1 n=8192 k=8192"
    assert floor.startswith("goal floor: MET") and beside.startswith("goal gemlite: MET")
    decode, floor, beside = said(ours, row("dense", 2.1), row("dequant", 0.9), row("gemlite", 0.99))
    assert all(": NOT MET: 0 of 1" in line for line in (decode, floor, beside))


def test_goal_names_the_point_below_it() -> None:
    many = [row("splitk", 1.0, 32, served=True), row("dense", 1.0, 32), row("dequant", 0.9, 32)]  # 0.9 < 0.95
    found = [row("gemv", 1.0, served=True), row("dense", 3.0), row("dequant", 4.0), *many]
    lines = list(goals.report_goals(goals.measured_points(found)))
    assert lines[0].startswith("goal decode: MET: 1 of 1")  # 32 rows are no decode
    assert "stretch: 1 of 1" in lines[1]
    assert lines[2].startswith("goal floor: NOT MET: 1 of 2") and lines[3] == "  0.90 at m=32 n=8192 k=8192"


def test_goal_without_measurements_is_not_met() -> None:
    ours = row("gemv", 1.0, served=True)
    decode, floor, beside = said(ours, row("dense", 3.0), row("gemlite", None))
    assert floor == "goal floor: NOT MEASURED; 1 of 1 points not measured" and "NOT MEASURED" in beside
    decode, *_ = said(ours, row("dense", 3.0), row("gemv", None, 2, served=True), row("dense", 3.0, 2))
    assert decode.startswith("goal decode: met where it was measured: 1 of 1") and "1 of 2 points not" in decode


def test_default_may_be_dequant_and_the_last_row_counts() -> None:
    found = [row("dequant", 1.0, served=True), row("dense", 9.0), row("dense", 1.0)]
    _, floor, _ = said(*found)
    assert floor.startswith("goal floor: MET: 1 of 1 points reach 0.95; the least is 1.00")


def test_goals_of_rows_without_a_default_one_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows.write(file, [row("dense", 1.0)])
    assert goals.main([str(file)]) == 2
    assert "no row of int4_matmul is marked as served" in capsys.readouterr().err
    rows.write(file, [row("gemv", 1.0, served=True)])
    assert goals.main([str(file)]) == 0
    assert "goal decode: NOT MET" in capsys.readouterr().out


def impl(name: str, fn: Callable[..., Any]) -> Impl:
    return replace(OPS["int4_matmul"].impls["naive"], name=name, fn=fn)


def test_accuracy_is_relative_to_the_exact_results() -> None:
    op = OPS["int4_matmul"]
    sizes = dict(m=2, n=16, G=2, group=64, dtype="float32", order="sub", bias=False)
    args = example_args(op, seed=0, **sizes)
    (exact,) = float64_reference(op, args)
    size = exact.square().mean().sqrt()

    def shifted(*args: Any) -> torch.Tensor:
        return exact + 0.5 * size

    found = accuracy.relative_error(impl("shifted", shifted), {}, args, exact)
    assert isinstance(found, dict)
    assert found["rms"] == pytest.approx(0.5) and found["worst"] == pytest.approx(0.5)
    broken = accuracy.relative_error(impl("broken", lambda *_: 1 // 0), {}, args, exact)
    assert broken == "ZeroDivisionError: integer division or modulo by zero"


def test_accuracy_sizes_are_of_production_with_both_dequant_roundings() -> None:
    yardstick, sizes = accuracy.yardstick_and_sizes("int4_matmul", toy=False)
    assert yardstick == "dense"
    assert {s["G"] * s["group"] for s in sizes} == {4096, 8192, 14336}
    assert {(s["order"], s["dtype"]) for s in sizes} == {(o, d) for o in ("sub", "fma") for d in ("float16", "float32")}
    with pytest.raises(ValueError, match=r"error\.toml has no 'rope'; it has: int4_matmul"):
        accuracy.yardstick_and_sizes("rope", toy=False)
