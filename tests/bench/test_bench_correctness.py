"""`bench.correctness` checks all that runs by default, and loses no more than an item to whatever a kernel does."""

import os
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import Plant, insert, plant  # noqa: F401 (plant: a fixture)

from bench.correctness import default_kernels
from bench.correctness.default_kernels import Item, all_items, check_item
from bench.correctness.error_budget import DEVICE, UNSUPPORTED_DTYPES
from bench.correctness.guarded_memory import MEMORY_LAYOUTS, MemoryLayout
from bench.measure import rows
from vila_triton.ops.dtypes import DTYPES
from vila_triton.registry import OPS, discover
from vila_triton.registry.kernel_config import PHASES, configured_choices
from vila_triton.registry.size_ranges import implementation_names

EVERY = all_items(torch.device(DEVICE))
VALUABLE = ("int4_matmul", "int4_swiglu", "prefill_attention", "decode_attention", "encoder_attention")
TILED = {  # the axes of each op that a block of a config cuts; several: their product, or sum with +
    "BLOCK": ("e", "f"),
    "BLOCK_M": ("m", "s"),
    "BLOCK_N": ("n", "t+s", "t", "s"),
    "BLOCK_K": ("k", "G group"),
    "BLOCK_H": ("h", "g ratio"),
    "BLOCK_G": ("g",),
}
WORKER = """
import json, os, sys
for line in sys.stdin:
    half = json.loads(line)["sizes"]["dtype"] == "float16"
    {body}
    print(json.dumps({{"state": "right", "reason": f"by {{os.getpid()}}", "alive": {alive}}}), flush=True)
"""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = default_kernels.main([*argv])
    return status, capsys.readouterr().out


def length(axes: str, sizes: Any) -> int:
    return sum(sizes[x] for x in axes.split("+")) if "+" in axes else prod(sizes[x] for x in axes.split())


def test_all_defaults_are_checked_in_every_dtype_most_valuable_first() -> None:
    for phase in PHASES:
        for op, choice in configured_choices("cuda", phase).items():
            for impl in implementation_names(choice):
                mine = [x for x in EVERY if (x.op, x.impl, x.usual, x.default) == (op, impl, True, True)]
                assert {x.sizes["dtype"] for x in mine} == set(DTYPES.values)
                assert all(x.config in OPS[op].impls[impl].configs for x in mine)
    assert {x.sizes["kv"] for x in EVERY if x.impl == "triton" and x.op == "kv_write"} == {"plain", "int8", "int4"}
    first = [x for x in EVERY if x.usual and x.default and x.sizes["dtype"] != "float32" and x.op in VALUABLE]
    assert len(first) == 2 * (3 + 1 + 3) and EVERY[: len(first)] == first
    assert EVERY[-1].sizes["dtype"] == "float32" and not EVERY[-1].usual


@pytest.mark.parametrize("item", [x for x in EVERY if x.usual and x.sizes["dtype"] == "float16"], ids=str)
def test_sizes_cover_more_than_one_tile_and_a_partial_one(item: Item) -> None:
    for block, axes in TILED.items():
        if (size := item.config.get(block, 1)) > 1:
            there = next(x for x in axes if set(x.replace("+", " ").split()) <= item.sizes.keys())
            at = length(there, item.sizes)
            assert at > size, f"{there} is one tile of {block}"
            assert at % size or there == "G group", f"{there} is whole tiles of {block}"  # groups are


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
def test_item_wrong_in_one_layout_is_wrong(layout: MemoryLayout, plant: Plant) -> None:  # noqa: F811
    plant("swiglu", "mine", insert(f"out += (stride_gs == F) == {layout == 'aligned'}", after="out = gate"))
    discover()
    (item,) = (x for x in EVERY if x.op == "swiglu" and x.sizes["dtype"] == "float16")
    assert check_item(item)["state"] == "right"
    answer = check_item(replace(item, impl="mine"))
    assert answer["state"] == "wrong" and answer["reason"].endswith(f"(its arguments were {layout})")
    other = next(x for x in MEMORY_LAYOUTS if x != layout)
    assert f"were {other}" not in answer["reason"]


def test_workers_check_items_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    status, said = run(capsys, "--op", "swiglu", "--processes", "1", "--out", str(out))
    found = {row["sizes"]["dtype"]: row for row in rows.read(out, kind="correctness")}
    assert (
        status == 0
        and set(found) == set(DTYPES.values)
        and set(rows.stamp(torch.device(DEVICE))) <= set(found["float32"])
    )
    assert found["float16"]["state"] == found["float32"]["state"] == "right" and found["float32"]["seconds"] > 0
    assert all(found[dtype]["state"] == "left out" for dtype in UNSUPPORTED_DTYPES)
    left = len(UNSUPPORTED_DTYPES)
    assert said.splitlines()[-1] == f"{3 - left} right, 0 wrong, 0 unsupported, {left} left out"


def test_item_that_kills_its_worker_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker, out = WORKER.format(body="half and os.kill(os.getpid(), 9)", alive=True), tmp_path / "rows.jsonl"
    monkeypatch.setattr(default_kernels, "PYTHON_COMMAND", [sys.executable, "-c", worker])
    status, said = run(capsys, "--op", "swiglu", "--op", "rope", "--processes", "2", "--out", str(out))
    left = 2 * len(UNSUPPORTED_DTYPES)
    assert status == 1 and said.splitlines()[-1] == f"{4 - left} right, 2 wrong, 0 unsupported, {left} left out"
    crashed = {row["op"]: row for row in rows.read(out, kind="correctness") if row["state"] == "crashed"}
    assert set(crashed) == {"swiglu", "rope"} and all("signal 9" in row["reason"] for row in crashed.values())


def test_worker_that_lost_its_gpu_gets_no_more_items(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        default_kernels, "PYTHON_COMMAND", [sys.executable, "-c", WORKER.format(body="", alive="not half")]
    )
    _, said = run(capsys, "--op", "swiglu", "--op", "rope", "--processes", "1")
    by = [line.split()[-1] for line in said.splitlines() if " by " in line]
    assert len(by) == 6 - 2 * len(UNSUPPORTED_DTYPES) and len(set(by)) == 3  # each of half precision had its own


def test_hanging_items_are_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(default_kernels, "PYTHON_COMMAND", [sys.executable, "-c", hangs])
    start = time.monotonic()
    status, said = run(capsys, "--op", "swiglu", "--processes", "1", "--seconds", "2")
    left = len(UNSUPPORTED_DTYPES)
    assert status == 1 and said.count("not reached           swiglu-triton") == 3 - left
    assert f"0 right, 0 wrong, 0 unsupported, {left} left out, {3 - left} not reached" in said
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < start + 15:
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)


def test_missing_python_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(default_kernels, "PYTHON_COMMAND", ["no-such-python"])
    status, said = run(capsys, "--op", "swiglu", "--processes", "1")
    assert status == 1 and said.count("could not be started") == 3 - len(UNSUPPORTED_DTYPES)


def test_worker_that_fails_to_start_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        default_kernels, "PYTHON_COMMAND", [sys.executable, "-c", "raise SystemExit('there is no torch')"]
    )
    status, said = run(capsys, "--op", "swiglu", "--processes", "1")
    assert status == 1 and said.count("there is no torch") == 3 - len(UNSUPPORTED_DTYPES)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--op", "sorcery"], "no op sorcery; there are: "),
        (["--op", "rope", "--only", "int4"], "no item of rope holds 'int4'"),
    ],
)
def test_bad_usage_is_refused_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert default_kernels.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
