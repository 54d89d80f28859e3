"""`bench.shadow --compiled`: a model's layers with one kernel as it is compiled for a GPU, beside what a CPU runs."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

from bench.correctness import repro_bundle

OPTIONS = ["--compiled", "sm_80", "--dtype", "bfloat16", "--count", "1", "--tokens", "1"]


def test_compiled_candidate_is_within_its_budget_in_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "worst"
    words = ["--op", "rms_norm", "--impl", "triton", "--layers", "layers[0]", "--save", str(file), *OPTIONS]
    monkeypatch.setattr(sys, "argv", ["bench.shadow", *words])
    shadow = import_module("bench.shadow")  # lets kernels be interpreted, unless argv has --compiled
    assert shadow.main() == 0
    said = capsys.readouterr().out
    assert "rms_norm: triton beside reference" in said and "Triton kernels run compiled for sm_80, emulated" in said
    assert "first layer beyond budget: none" in said and "the model on the candidate alone" in said
    assert repro_bundle.load(file).target == "sm_80"
