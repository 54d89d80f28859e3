"""Decoding and cache writes compile to tensor cores and 16-byte loads without spills, as is seen without a GPU too.

Beside the sizes of `test_compile`: quantized pages, and head dims that are no power of two or wider than 128.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LLAMA = "b=4 t=4096 g=8 ratio=4 d=128 dtype=float16"
RUNS = {
    "int8": ("decode_attention", f"{LLAMA} l=16 kv=int8", "sm_90"),
    "int4": ("decode_attention", f"{LLAMA} l=16 kv=int4", "sm_80"),
    "72": ("decode_attention", "b=4 t=4096 g=4 ratio=1 d=72 l=16 dtype=bfloat16", "sm_90"),
    "write": ("rope_kv_write", "s=64 g=8 ratio=4 d=128 l=16 dtype=float16 kv=int4", "sm_90,gfx942"),
}


@pytest.mark.parametrize("run", RUNS)
def test_nothing_spills_and_keys_come_16_bytes_at_a_time(run: str, tmp_path: Path) -> None:
    """A head of 72 is 9 such loads: https://github.com/triton-lang/triton/pull/10389. Quantised rows are half or a
    quarter as wide, and AMD's waves of 64 threads leave less of a tile to each."""
    op, sizes, archs = RUNS[run]
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench.inspect", op, "--impl", "triton", "--arch", archs, "--json", str(file)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([*command, "--size", *sizes.split()], cwd=ROOT, env=env, check=True, capture_output=True)
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows
    for row in rows:
        where = (row["kernel"], row["config"], row["target"])
        assert not row["spills"] and row["blocks"], where
        if row["kernel"] == "_decode_attention_kernel":
            assert row["loops"] and all(loop["tensor"] for loop in row["loops"]), where
            if "kv" not in sizes and row["target"] != "gfx942":
                assert all(any("128" in name for name in loop["loads"]) for loop in row["loops"]), where
