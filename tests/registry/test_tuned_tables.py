"""Tuned tables cover every size, are looked up by the sizes of a call, and are refused when they are stale."""

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_op import load

from bench import tune
from bench.correctness.error_budget import example_args, example_strategy
from bench.tuner import table
from vila_triton.registry import OPS, Op, discover, tuned_tables, use

discover()


@pytest.fixture
def doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Op:
    return load(tmp_path, monkeypatch)


SIZE = st.integers(0, 5000)


def test_range_holds_with_a_bias_or_a_residual_as_without() -> None:
    tuned_at = {"m": [0, 4], "n": 16, "bias": False, "residual": False}
    for bias, residual in product((False, True), repeat=2):
        sizes = {"m": 3, "bias": bias, "residual": residual}
        assert tuned_tables.sizes_match(tuned_at, {**sizes, "n": 16})
        assert not tuned_tables.sizes_match(tuned_at, {**sizes, "n": 17})


@given(st.sets(st.tuples(SIZE, SIZE), min_size=1, max_size=6))
def test_every_size_lies_in_one_range_around_the_nearest_tuned_one(tuned_at: set[tuple[int, int]]) -> None:
    at = [table.TunedPoint({"b": b, "t": t, "d": 8}, {json.dumps({"id": [b, t]}): 1.0}) for b, t in tuned_at]
    entry = {"ranges": table.table_ranges(at, ["b", "t"]), "otherwise": {"config": {}}}
    ends = [[n for r in entry["ranges"] for n in r["sizes"][name] if n is not None] for name in "bt"]
    for b, t in product(*({0, 10**9, *some, *(n + 1 for n in some)} for some in ends)):
        (only,) = [r for r in entry["ranges"] if tuned_tables.sizes_match(r["sizes"], {"b": b, "t": t, "d": 8})]
        assert not tuned_tables.sizes_match(only["sizes"], {"b": b, "t": t, "d": 9})
        near = only["tuned_at"]["b"]  # the geometric mean of two is as far from the one as from the other
        assert not [n for n, _ in tuned_at if (near < n and b * b > near * n) or (n < near and b * b < near * n and b)]
    for point in tuned_at:
        assert tuned_tables.config_for_sizes(entry, dict(zip("bt", point), d=8))["id"] == list(point)


def test_otherwise_is_the_config_of_least_worst_slowdown() -> None:
    a, b, c = '{"c":"a"}', '{"c":"b"}', '{"c":"c"}'
    at = [
        table.TunedPoint({"m": 1}, {a: 1.0, b: 1.5, c: 1.0}),
        table.TunedPoint({"m": 2}, {a: 9.0, b: 4.0}),
    ]
    assert table.fallback_config(at, {a, b, c}) == {"config": {"c": "b"}, "worst_regret": 1.5, "sizes_without_time": 0}
    assert table.fallback_config(at, {a, c}) == {"config": {"c": "a"}, "worst_regret": 2.25, "sizes_without_time": 0}


@pytest.fixture
def served(doubled: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Op, dict[str, Any], Path]]:
    """The toy op on a device for which there is a table: (op, its entry, the file)."""
    monkeypatch.setattr(tuned_tables, "tables_dir", lambda: tmp_path / "tuned")
    monkeypatch.setattr(tuned_tables, "gpu_name", lambda device: "Toy GPU")
    impl = doubled.impls["blocks"]
    ranges = [
        {"sizes": {"m": m, "n": 8, "dtype": "float32"}, "config": {"BLOCK": block, "wrong": False}}
        | {"tuned_at": {"m": block}, "seconds": 1e-5}
        for m, block in (([0, 4], 2), ([5, None], 4))
    ]
    otherwise = {"config": {"BLOCK": 8, "wrong": False}}
    entry = {
        "op": "doubled",
        "impl": "blocks",
        **tuned_tables.entry_fingerprint(impl),
        "ranges": ranges,
        "otherwise": otherwise,
    }
    for cached in (tuned_tables.load_table, tuned_tables.valid_entry, tuned_tables.tuned_config_at):
        cached.cache_clear()
    yield doubled, entry, table.write_table(tmp_path / "tuned", "Toy GPU", entry)
    for cached in (tuned_tables.load_table, tuned_tables.valid_entry, tuned_tables.tuned_config_at):
        cached.cache_clear()


def blocks_run(op: Op, *shapes: tuple[int, int], **kwargs: Any) -> list[int]:
    ran = sys.modules["toy_doubled"].ran
    ran.clear()
    with use(doubled="blocks"):
        for shape in shapes:
            op.impls["blocks"](torch.ones(shape), **kwargs) if kwargs else op(torch.ones(shape))
    return list(ran)


SHAPES = ((1, 8), (4, 8), (5, 8), (10**6, 8), (4, 7))


def test_calls_run_the_tuned_config_unless_they_pass_one(served: tuple[Op, dict, Path]) -> None:
    op, _, _ = served
    assert blocks_run(op, *SHAPES) == [2, 2, 4, 4, 8]
    assert blocks_run(op, *SHAPES, config={"BLOCK": 16, "wrong": False}) == [16] * 5


def test_without_a_table_the_first_config_runs(served: tuple[Op, dict, Path]) -> None:
    op, _, file = served
    file.unlink()
    assert blocks_run(op, *SHAPES) == [1] * 5


def test_a_changed_kernel_makes_its_table_stale(served: tuple[Op, dict, Path]) -> None:
    op, _, file = served
    assert list(tune.stale_entries(file.parent)) == []
    source = op.impls["blocks"].file
    source.write_text(source.read_text() + "\n")
    with pytest.raises(
        tuned_tables.StaleTableError, match=r"doubled blocks: the tuned table toy-gpu.json is stale: kernel was \w+, is"
    ):
        blocks_run(op, (1, 8))
    assert blocks_run(op, (1, 8), config={"BLOCK": 16, "wrong": False}) == [16]
    (line,) = tune.stale_entries(file.parent)
    assert line.startswith("toy-gpu.json: doubled blocks: kernel was")


def test_a_table_of_another_device_is_stale(served: tuple[Op, dict, Path]) -> None:
    op, _, file = served
    file.write_text(file.read_text().replace("Toy GPU", "Another"))
    with pytest.raises(tuned_tables.StaleTableError, match=r"toy-gpu\.json was made on Another, this is Toy GPU"):
        blocks_run(op, (1, 8))
    assert "toy-gpu.json: was made on Another" in list(tune.stale_entries(file.parent))


def test_a_table_tuned_with_another_triton_is_ignored_with_a_warning(served: tuple[Op, dict, Path]) -> None:
    op, entry, file = served
    table.write_table(file.parent, "Toy GPU", {**entry, "triton": "3.0.0"})
    with pytest.warns(UserWarning, match="left aside: triton was 3.0.0"):
        assert blocks_run(op, (1, 8)) == [1]


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.domain], ids=lambda op: op.name)
def test_sizes_from_args_inverts_example_inputs(op: Op) -> None:
    """But for t, which lies on the device; s lies there too unless there is one sequence."""
    sizes_of = op.sizes_of
    assert sizes_of and op.dynamic_sizes

    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        seed = sizes.pop("seed")
        sizes = {**sizes, "b": 1} if "attention" in op.name and "s" in sizes else sizes
        found = sizes_of(*example_args(op, seed, **sizes))
        assert found.keys() == sizes.keys()
        assert all(found[name] == size for name, size in sizes.items() if name != "t")

    check()
