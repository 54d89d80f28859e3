"""`bench.check --compiled` shrinks a fault of compiled code, says where it is, and replays it from any process."""

import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from mutants import Plant, exchange, plant  # noqa: F401 (plant: a fixture)

from bench import check
from bench.correctness import compiled_calls, kept_coverage, repro_bundle
from bench.correctness.compiled_cell import Cell, check_cell
from bench.correctness.compiled_table import table
from bench.correctness.gate import gate
from bench.emulator import emulating
from vila_triton.registry import OPS, discover

discover()


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_coverage, "FOLDER", tmp_path / "kept")


def test_read_beyond_a_row_is_shrunk_saved_and_replayed(plant: Plant, tmp_path: Path, capsys) -> None:  # noqa: F811
    """One element further than the mask should reach: within budget where that is 0 or NaN, and always a fault."""
    plant("swiglu", "ahead", exchange("offs < F", "offs <= F"))
    words = ["swiglu", "--impl", "ahead", "--config", "0", "--compiled", "sm_80", "--out", str(tmp_path)]
    assert check.main(words) == 1
    said = capsys.readouterr().out
    assert "Triton kernels run compiled for sm_80, emulated" in said
    assert re.search(r"shrunk case  s=1 f=1 dtype=float32 seed=0\n", said), said
    assert re.search(
        r"what failed  (out of bounds|between elements): swiglu ahead .* for sm_80, \S+ahead\.py:\d+: ", said
    ), said
    file = tmp_path / "swiglu-ahead-0-sm_80.bundle"
    assert repro_bundle.load(file).target == "sm_80"
    assert check.main(["--replay", str(file)]) == 1
    with emulating("sm_80"):
        assert "KernelFault" in (gate(OPS["swiglu"].impls["ahead"], OPS["swiglu"].impls["ahead"].configs[0]) or "")
    plant("swiglu", "ahead")  # mended
    assert check.main(["--replay", str(file)]) == 0


def test_bundle_of_compiled_code_is_replayed_by_a_process_that_interprets(tmp_path: Path) -> None:
    """The command starts another process, which does not interpret."""
    impl, file = OPS["swiglu"].impls["triton"], tmp_path / "x.bundle"
    sizes = {"s": 1, "f": 16, "dtype": "bfloat16"}
    args = OPS["swiglu"].make_example(**sizes, rng=torch.Generator().manual_seed(0), device="cpu")
    repro_bundle.save(file, impl, impl.configs[0], args, 0, "aligned", sizes, "a test", "sm_90")
    command = [sys.executable, "-m", "bench.check", "--replay", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the call matches the reference now" in done.stdout and "compiled for sm_90, emulated" in done.stdout


@pytest.mark.parametrize("saved_for", ["", "sm_90"])
def test_bundle_is_replayed_for_another_target(saved_for: str, tmp_path: Path, capsys) -> None:
    impl, file = OPS["swiglu"].impls["triton"], tmp_path / "x.bundle"
    sizes = {"s": 1, "f": 16, "dtype": "float16"}
    args = OPS["swiglu"].make_example(**sizes, rng=torch.Generator().manual_seed(0), device="cpu")
    repro_bundle.save(file, impl, impl.configs[0], args, 0, "aligned", sizes, "a test", saved_for)
    targets = []
    with patch.object(compiled_calls, "emulating", lambda target: targets.append(target) or emulating(target)):
        assert check.main(["--replay", str(file), "--compiled", "sm_80"]) == 0, capsys.readouterr()
    assert targets == ["sm_80"] and "compiled for sm_80, emulated" in capsys.readouterr().out


def test_compiled_code_of_no_triton_kernel_is_refused(capsys) -> None:
    assert check.main(["swiglu", "--impl", "aten", "--compiled", "sm_80"]) == 2
    assert "swiglu has no implementation with Triton kernels 'aten'" in capsys.readouterr().err


def test_cell_of_the_lane_covers_dtypes_layouts_and_blocks(tmp_path: Path) -> None:
    cell = Cell("rms_norm", "triton", 1, "sm_90")
    row = check_cell((cell, tmp_path / "journal.jsonl", tmp_path))
    assert not row["wrong"] and row["examples"] >= 6
    assert {kernel["kernel"] for kernel in row["kernels"]} == {"_rms_norm_kernel"} and len(row["kernels"]) >= 6
    assert "| rms_norm | triton | sm_90 | 1 |" in table({cell: row})


def test_wrong_cell_has_a_bundle(plant: Plant, tmp_path: Path) -> None:  # noqa: F811
    plant("swiglu", "ahead", exchange("offs < F", "offs <= F"))
    discover()
    row = check_cell((Cell("swiglu", "ahead", 0, "sm_80"), tmp_path / "journal.jsonl", tmp_path))
    assert row["wrong"] and {failure["kind"] for failure in row["wrong"]} <= {"out of bounds", "between elements"}
    assert repro_bundle.load(Path(row["wrong"][0]["bundle"])).impl == "ahead"
    assert "## Wrong" in table({Cell("swiglu", "ahead", 0, "sm_80"): row})
