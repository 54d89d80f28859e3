"""`bench.serve` on servers of vLLM: with our kernels and with vLLM's own, which answer alike."""

import json
import sys
from pathlib import Path

import pytest

from bench import serve
from vila_triton.paths import BUNDLED_CHECKPOINT

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("model", "dtype", "ours"),
    [
        (BUNDLED_CHECKPOINT, "float32", {"decode_attention", "prefill_attention", "kv_write"}),
        (BUNDLED_CHECKPOINT.with_name("checkpoint-int4"), "bfloat16", {"decode_attention", "int4_matmul"}),
    ],
    ids=["dense", "int4"],
)
def test_servers_with_our_kernels_and_with_vllms_are_compared(
    model: Path, dtype: str, ours: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve, "GATE_REQUESTS", 24)
    options = ["--model", str(model), "--dtype", dtype, "--streams", "4", "--requests", "8", "--rounds", "1"]
    out = tmp_path / "rows.jsonl"
    assert serve.main([*options, "--vllm", sys.executable, "--right", "0.7", "--out", str(out)]) == 0
    rows = {row["choice"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["vila-triton", "vllm's kernels", "engine"]
    ran = {name: {kernel.partition("=")[0] for kernel in row.get("kernels", ())} for name, row in rows.items()}
    assert ours <= ran["vila-triton"] and "encoder_attention" in ran["vllm's kernels"]
    assert not {"decode_attention", "int4_matmul", "kv_write"} & ran["vllm's kernels"]
    for row in rows.values():
        assert row["errors"] == 0 and row["differing"] <= 1 and row["ratio_vllm"]["ttft"] > 0
