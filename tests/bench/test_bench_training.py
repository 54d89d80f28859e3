"""Training steps: every runner has its row, what a layer keeps is as counted by hand, wrong gradients get no time."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import training
from bench.measure import model_configs
from bench.measure.runners import HF
from vila_triton.registry import OPS, Impl

SHORT = ["--model", "tiny", "--layers", "1", "--tokens", "12", "--rounds", "2", "--device", "cpu"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture, tmp_path: Path) -> Any:
    """Run the command: (exit code, stdout, rows)."""

    def run(*args: str) -> tuple[int, str, list[dict[str, Any]]]:
        file = tmp_path / "rows.jsonl"
        code = training.main([*SHORT, "--out", str(file), *args])
        return code, capsys.readouterr().out, [json.loads(line) for line in file.read_text().splitlines()]

    return run


def test_every_runner_has_a_row_with_what_was_measured(run: Any) -> None:
    code, out, rows = run("--kept")
    assert code == 0
    assert [(row["choice"], row["checkpointed"]) for row in rows] == [
        (n, c) for c in (False, True) for n in ("default", HF)
    ]
    for row in rows:
        assert row["kind"] == "training" and (row["model"], row["layers"], row["tokens"]) == ("tiny", 1, 12)
        assert 0 < row["low"] <= row["seconds"] <= row["high"] and row["rounds"] == 2 and row["peak_bytes"] > 0
        assert row["kept_bytes"] == sum(size * count for _, size, count in row["kept"]) > 0
        ratios = [row[f"hf_{name}"] for name in ("seconds", "peak_bytes", "kept_bytes")]
        assert all(ratio > 0 for ratio in ratios) and (ratios == [1, 1, 1] or row["choice"] != HF)
        if row["checkpointed"]:  # the input of the layer alone
            assert row["kept_bytes"] == 4 * 12 * 256
    assert "float32 hf eager, checkpointed" in out and "3 x float32 [12, 512]" in out


def test_adapters_are_trained_on_int4_weights(run: Any) -> None:
    """Gradients are those of adapters alone, and Hugging Face's on dequantized weights are as right."""
    code, _, rows = run("--weights", "int4", "--measure", "memory")
    assert code == 0 and {(row["choice"], row["dtype"]) for row in rows} == {("default", "bfloat16"), (HF, "bfloat16")}
    assert all(row["peak_bytes"] < 4 * 2**20 for row in rows)  # gradients of all weights would be as much


def test_a_layer_keeps_what_its_gradients_need_once(run: Any) -> None:
    """Inputs of both norms and of all linears, q and k rotated, v, attention and its log-sum-exp."""
    s, e, f, kv, heads = 12, 256, 512, 2 * 32, 8
    _, _, rows = run("--measure", "kept", "--baseline", "none")
    kept = {row["checkpointed"]: row["kept_bytes"] for row in rows}
    large = 4 * s * (5 * e + (e + kv + kv) + 3 * f + heads)
    assert large <= kept[False] <= large + 64 and kept[True] == 4 * s * e


def test_runner_with_wrong_gradients_gets_no_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that is a little off is named and not timed; the others are, and the exit code says so."""

    def leak(*args: Any) -> tuple[Tensor, Tensor]:
        grad_gate, grad_up = OPS["swiglu_backward"].reference(*args)
        return grad_gate * 1.001, grad_up

    monkeypatch.setitem(
        OPS["swiglu_backward"].impls, "leaky", Impl("swiglu_backward", "leaky", leak, ({},), Path(__file__))
    )
    choices = ["--choice", "swiglu_backward=leaky", "--choice", "default"]
    code, out, rows = run(*choices, "--measure", "memory", "--baseline", "none")
    assert code == 1 and re.search(r"float32 swiglu_backward=leaky +no time: the gradient of model\..* is off by", out)
    assert {row["choice"] for row in rows if row["kind"] == "training"} == {"default"}
    assert {row["choice"] for row in rows if row["kind"] == "refused"} == {"swiglu_backward=leaky"}


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert training.main([*SHORT, "--weights", "int8"]) == 2
    assert "no int8; there are: float32" in capsys.readouterr().err
    assert training.main([*SHORT, "--tokens", "5000"]) == 2
    assert "5000 tokens, but tiny was made for 4096" in capsys.readouterr().err


def test_a_layer_of_triton_kernels_keeps_as_much() -> None:
    names = ("rms_norm", "swiglu", "rope", "prefill_attention")
    triton = ",".join(f"{name}=triton" for name in names)
    cfg, ids = model_configs.load_model("tiny").llm, torch.zeros(1, 3, dtype=torch.int64)
    kept = training.kept_by_layer(cfg, "float32", ["default", triton], ids)
    assert kept["default", False] == kept[triton, False] and sum(kept[triton, True].values()) == 1
