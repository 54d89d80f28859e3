"""`python -m bench.emulate` on kernels of this repository."""

import sys
from pathlib import Path

import pytest

from bench import emulate
from bench.compiler.cross_compile import CompileRequest
from bench.compiler.disassembly import TENSOR
from bench.emulator.counters.emulated_call import emulate_call
from bench.measure import rows
from vila_triton.registry import discover


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_matrix_product_does_the_work_of_its_op(target: str) -> None:
    discover()
    sizes = {"m": 64, "n": 64, "k": 128, "dtype": "bfloat16"}
    (row,) = emulate_call(CompileRequest("linear", "triton", 0, target, sizes), checks=False).kernels
    assert row["tensor_flops"] == row["op_flops"] == 2 * 64 * 64 * 128 and row["kinds"][TENSOR]
    assert (row["unit"], row["units"]) == ("weight", 64 * 128)
    bias = row["op_bytes"] - 2 * (64 * 128 + 64 * 128 + 64 * 64)
    assert row["written_bytes"] == 2 * 64 * 64
    assert (row["read_bytes"] - 2 * (64 * 128 + 64 * 128)) / bias in (4, 8)  # by each warp, maybe by halves of it


def test_kernel_compared_with_itself_has_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    options = ["--against", "HEAD", "--json", str(file), "--plot", str(tmp_path / "plot"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.emulate", "swiglu", "--impl", "triton", "--target", "sm_90", *options])
    assert emulate.main() == 0
    text = capsys.readouterr().out
    assert "_swiglu_kernel: no difference" in text and "moves 197 kB, 1.00 of the 197 kB that must move" in text
    old, new = rows.read(file, kind="emulate")
    assert (old.pop("source"), new.pop("source")) == ("HEAD", "") and old == new
    assert (tmp_path / "plot.png").exists() and (tmp_path / "plot.svg").exists()
