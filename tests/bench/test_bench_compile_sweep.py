"""The loads that a sweep expects, the calls that it makes, and the goals of attention from rows alone."""

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from bench import compile_sweep
from bench.measure import goals_attention
from vila_triton.registry import discover

discover()


@pytest.mark.parametrize(
    ("sizes", "keys", "threads", "bytes_"),
    [
        ({"d": 128}, 64, 128, 16),
        ({"d": 72}, 64, 128, 16),  # rows begin at multiples of 16 bytes
        ({"d": 72, "kv": "int4"}, 64, 128, 4),  # of 4 only
        ({"d": 32}, 32, 256, 8),  # a tile has no more for each thread
    ],
)
def test_possible_load_bytes_follow_row_alignment_and_tile(sizes: dict, keys: int, threads: int, bytes_: int) -> None:
    found: Any = SimpleNamespace(stats=SimpleNamespace(tile={"BLOCK_N": keys}, threads=threads))
    assert compile_sweep.possible_load_bytes(sizes, found) == bytes_


def test_sweep_requests_only_the_sizes_asked_for_and_name_unknown_ops() -> None:
    args = argparse.Namespace(op=["encoder_attention"], impl=None, arch=["sm_90"], size=["d=72,96", "dtype=float16"])
    assert {call.sizes["d"] for call in compile_sweep.build_requests(args)} == {72, 96}
    with pytest.raises(ValueError, match=r"compile_sweep\.toml has no rope; it has prefill_attention"):
        list(compile_sweep.build_requests(argparse.Namespace(**{**vars(args), "op": ["rope"]})))
    with pytest.raises(ValueError, match=r"--size D: expected NAME=VALUE,.*, a name among b, d"):
        list(compile_sweep.build_requests(argparse.Namespace(**{**vars(args), "size": ["D=72"]})))


def test_sweep_without_requests_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sweep", "encoder_attention", "--impl", "nonsense"])
    monkeypatch.setattr(compile_sweep, "load_implementations", lambda kernels, peers: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # which it sets
    with pytest.raises(SystemExit):
        compile_sweep.main()
    assert "no implementation and sizes are left to compile" in capsys.readouterr().err


def row(op: str, impl: str, seconds: float, served: bool = False, **about: Any) -> dict[str, Any]:
    usual = {"kind": "op", "case": "whole", "config": {}, "bytes": 2e8, "bytes_share": 0.9}
    sizes = {"b": 1, "s": 2048, "t": 0} if op == "prefill_attention" else {"b": 1, "t": 32768}
    return {**usual, "op": op, "impl": impl, "seconds": seconds, "served": served, "sizes": sizes, **about}


def test_attention_goals_are_ratios_of_rows() -> None:
    found = [row("prefill_attention", "triton", 1.0, True), row("prefill_attention", "sdpa_cudnn", 0.8)]
    found += [row("decode_attention", "triton", 1.0, True, case="decode")]
    about = {"kind": "model", "what": "streaming", "device": "d", "model": "m", "layers": 4}
    about |= {"weights": "int4", "choice": "default"}
    found += [{**about, "prompt": 32, "history": n, "seconds": s} for n, s in ((16, 1.0), (1024, 1.04), (16384, 1.4))]
    prefill, stretch, copy, decode, near, far = goals_attention.report_attention_goals(found)
    assert prefill.startswith("goal prefill: MET: 1 of 1 points reach 0.75; the least is 0.80 at b=1 s=2048 t=0")
    assert stretch.strip() == "stretch: 0 of 1 points reach 0.95" and copy.startswith("goal copy: MET")
    assert decode.startswith("goal decode: NOT MEASURED")
    assert "after 1024: MET: 1.040" in near and "after 16384: NOT MET: 1.400" in far
