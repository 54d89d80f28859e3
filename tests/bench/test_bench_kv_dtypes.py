"""bench.kv_dtypes: bytes are counted by hand, and the error grows as bits go."""

import json
from pathlib import Path

import pytest

from bench import kv_dtypes


def test_bytes_per_token_of_the_bundled_model_follow_from_its_heads(capsys: pytest.CaptureFixture) -> None:
    assert kv_dtypes.main(["--count", "0"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny"))
    heads = 2 * 4 * 2  # keys and values, layers, heads of 32 numbers
    plain, scale = [32 * size for size in (4, 2, 2)], 4
    assert line.split()[1:] == [f"{heads * n:,}" for n in (*plain, 32 + scale, 16 + 2 * scale)]


def test_logits_error_grows_with_fewer_bits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert kv_dtypes.main(["--count", "2", "--steps", "4", "--out", str(tmp_path / "rows.jsonl")]) == 0
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    off = {row["kv_dtype"]: row["relative"] for row in found if row["kind"] == "kv error"}
    assert off["float32"] == off["float16"] == 0 < off["bfloat16"] < off["int8"] < off["int4"] < 1


def test_more_questions_than_exist_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert kv_dtypes.main(["--count", "1000"]) == 2
    assert capsys.readouterr().err.startswith("bench.kv_dtypes: 1000 bundled questions")
