"""`bench.recompiles`: how many variants of each kernel serving compiles, and that it names what causes them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import exchange, renamed

from bench.recompiles import LaunchTrace, check_ops, key_differences, main, max_variants, size_sweep
from vila_triton.registry import OPS, discover

ROOT = Path(__file__).resolve().parents[2]


def recompiles(*words: str) -> subprocess.CompletedProcess[str]:
    """The tool in a fresh interpreter, told as here that kernels are interpreted, which it must not mind."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.recompiles", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_kernels_have_no_more_variants_than_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.recompiles", "--workers", "1"])
    assert main() == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    seen = re.findall(r"^(\w+) (\w+) (\w+): (\d+) calls, (\d+) variants, at most (\d+)$", printed, re.M)
    discover()
    assert {(op, impl) for op, impl, *_ in seen} >= {(x.name, "triton") for x in OPS.values() if "triton" in x.impls}
    for _, _, kernel, calls, variants, most in seen:
        assert int(most) == max_variants(kernel) >= int(variants) >= 1 and int(calls) >= 5
    assert "M is no longer 1" in printed  # the sweep does reach what compiles anew


def test_constant_that_follows_the_length_is_named_and_refused(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / "kernels" / "swiglu.py").read_text()
    mine = exchange("BLOCK", "16 * s", keyword="BLOCK")(renamed(text, "triton", "mine"))
    mine = mine.replace("_swiglu_kernel", "_kernel")
    (tmp_path / "kernels" / "swiglu_mine.py").write_text(mine)
    done = recompiles("swiglu", "--replace-kernels", str(tmp_path / "kernels"), "--workers", "1")
    assert done.returncode == 1
    lengths = len(list(size_sweep(OPS["swiglu"])))
    assert f"swiglu mine _kernel: {lengths} calls, {lengths} variants" in done.stdout
    assert re.search(r"^ +s=2 +BLOCK = 16 -> 32$", done.stdout, re.M)
    assert done.stderr.strip().startswith(f"bench.recompiles: _kernel: {lengths} variants, at most")


def test_recompiles_names_an_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"no op nonsense; there are: .*int4_matmul"):
        check_ops(["swiglu", "nonsense"], None)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (("i32", "D"), ("constexpr", 1), "n became 1"),
        (("constexpr", 1), ("i32", ""), "n is no longer 1"),
        (("i32", ""), ("i32", "D"), "n became divisible by 16"),
        (("*fp16", "D"), ("*fp16", ""), "n is no longer divisible by 16"),
        (("i32", "D"), ("i64", "D"), "n i32 -> i64"),
        (("*fp16", "D"), ("*bf16", "D"), "n *fp16 -> *bf16"),
        (("constexpr", 64), ("constexpr", 128), "n = 64 -> 128"),
        (4, 8, "n 4 -> 8"),
    ],
)
def test_key_differences_are_described(old: object, new: object, words: str) -> None:
    assert list(key_differences({"n": old, "m": 0}, {"n": new, "m": 0})) == [words]


def test_key_is_compared_with_the_most_similar_one() -> None:
    found = LaunchTrace()
    for a, b in ((1, 1), (2, 2), (2, 3), (1, 1)):
        found.record("kernel", {"a": a, "b": b}, {})
    assert [v.reasons for v in found.variants["kernel"]] == [["first call"], ["a 1 -> 2", "b 1 -> 2"], ["b 2 -> 3"]]
