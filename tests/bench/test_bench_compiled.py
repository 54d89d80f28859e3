"""A config that spills and a weight load narrower than documented are found; another library's kernels stand
beside ours.

What all configs are asked is in test_compile.py; here are planted ones.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mutants import Edit, exchange, in_first_config

from bench.compiler import inspect_peer as beside
from bench.compiler.cross_compile import CompileRequest, CompileResult
from bench.compiler.inspect_text import InspectedCall
from bench.compiler.kernel_stats import KernelAnalysis
from bench.compiler.production_sizes import compile_spec
from vila_triton.registry import OPS, discover

pytestmark = pytest.mark.slow

discover()
ROOT = Path(__file__).resolve().parents[2]


def compiled(kernels: Path, call: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status and the rows of bench.compiled on the kernels of a folder."""
    command = f"-m bench.compiled --targets sm_90 --only {call} --replace-kernels {kernels} --workers 1"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


SPLITK = "int4_matmul_splitk.py"
PLANTED = {
    "as it is": ("_int4_dequant.py", lambda text: text, ""),
    "narrow": (
        "_int4_dequant.py",
        exchange("word", "(word ^ 2)", function="word_pointers"),
        "loads 4 bytes of weights at a time, documented are 16",
    ),
    "spills": (SPLITK, in_first_config("num_warps", 1), r"spills \d+ and uses \d+ registers"),
    "shared memory": ("int4_matmul_prefill.py", in_first_config("num_stages", 64), r"wants \d+ bytes of shared memory"),
    "does not compile": (SPLITK, exchange("int4_decode_tile", "int4_decode_tiles"), "NameError"),
}


@pytest.mark.parametrize(("file", "edit", "wrong"), PLANTED.values(), ids=PLANTED)
def test_planted_faults_are_reported(file: str, edit: Edit, wrong: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / "kernels" / file
    planted.write_text(edit(planted.read_text()))
    impl = "prefill" if "prefill" in file else "splitk"
    status, (main, *_) = compiled(tmp_path / "kernels", f"int4_matmul-{impl}-0")
    assert status == bool(wrong)
    assert re.search(wrong, " ".join(main["wrong"])) if wrong else main["wrong"] == [] and main["weight_bytes"] == 16


def test_documented_load_width_is_that_of_the_kernel_files() -> None:
    """configs/bench/inspect.toml and the docstrings say the same."""
    op = OPS["int4_matmul"]
    assert "a lane's four words, one 16-byte load" in " ".join(
        (ROOT / "kernels" / "_int4_dequant.py").read_text().split()
    )
    for name in ("packed", "gemv", "splitk", "prefill", "dequant"):
        assert (
            compile_spec(op, name, {}).weight_load_bytes == 16
            and "from ._int4_launch import" in op.impls[name].file.read_text()
        )
    assert (
        compile_spec(op, "naive", {}).weight_load_bytes == 4
        and "four bytes at a time" in op.impls["naive"].file.read_text()
    )


def test_production_sizes_are_per_variant_and_hold_a_whole_tile() -> None:
    op = OPS["int4_matmul"]
    sizes = {name: compile_spec(op, name, {"BLOCK_M": 1}).sizes for name in ("gemv", "splitk", "prefill", "mine")}
    assert {name: s["m"] for name, s in sizes.items()} == {"gemv": 1, "splitk": 16, "prefill": 1024, "mine": 16}
    assert all((s["n"], s["G"] * s["group"], s["group"]) == (4096, 4096, 128) for s in sizes.values())
    assert compile_spec(op, "splitk", {"BLOCK_M": 64}).sizes["m"] == 64
    assert compile_spec(OPS["rope"], "triton", {}).peer is None


def found(impl: str, per_unit: float | None, rows_of_x: int = 16, refused: str = "") -> InspectedCall:
    """As inspect finds a kernel."""
    loop = {"weight_loads": {"LDG.128": 2}, "weight_bytes": 16, "tensor": {}, "whole": False}
    row = {"kernel": f"_{impl}", "unit": "weight", "per_unit": per_unit, "loops": [loop], "sizes": {"m": 16}}
    row |= {"registers": 90, "spills": 0, "shared": 256, "tile": {"BLOCK_M": rows_of_x, "num_warps": 4}}
    outcome: CompileResult[KernelAnalysis] = CompileResult(unsupported=refused)
    return InspectedCall(
        CompileRequest("int4_matmul", impl, 0, "sm_90", row["sizes"]), "", outcome, [] if refused else [row]
    )


def test_peer_table_names_configs_with_more_instructions_than_the_peer() -> None:
    ours = [found("splitk", 3.0), found("packed", 18.0), found("gemv", 12.0)]
    theirs = {0: found("gemlite", 7.0), 1: found("gemlite", 8.0), 2: found("gemlite", 7.0, rows_of_x=4)}
    lines = list(beside.peer_table(ours, theirs, {}))
    assert "0.43 of it" in lines[2] and "2.25 of it" in lines[4] and "0.43 of it" in lines[6]
    assert "7.00 x 4 a weight" in lines[7]  # four tiles of 4 rows make a number of it four times
    assert lines[-2].endswith("ours needs fewer in 2 of 3")
    assert lines[-1] == "  not fewer in packed 0 sm_90: 18.00, gemlite 8.00"


def test_peer_table_of_a_missing_peer_is_one_line_and_names_refusals() -> None:
    ours = [found("splitk", 3.0)]
    assert list(beside.peer_table(ours, {}, {"gemlite": "No module"})) == [
        "beside gemlite: not compared, it is not here: No module"
    ]
    lines = list(beside.peer_table(ours, {0: found("gemlite", None, refused="only for sm_80\nand more")}, {}))
    assert "not compared: splitk 0 sm_90: only for sm_80" in lines and lines[-1].endswith("fewer in 0 of 0")


def test_peer_requests_have_our_tile_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["int4_matmul"]
    monkeypatch.setattr(op, "impls", {**op.impls, "gemlite": op.impls["naive"]})
    splitk, dequant = (CompileRequest("int4_matmul", name, 0, "sm_90", {"m": 16}) for name in ("splitk", "dequant"))
    calls = beside.peer_requests([dequant, splitk])  # dequant has no tile of a product
    assert calls == {1: CompileRequest("int4_matmul", "gemlite", op.impls["splitk"].configs[0], "sm_90", {"m": 16})}
