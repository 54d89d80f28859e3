"""The report shows the numbers of the rows, needs nothing beside it, and drops nothing."""

import json
import os
import re
import subprocess
import sys
from html import unescape
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENTS

from bench import report
from bench.measure import rows
from bench.measure.format import format_config, format_seconds

TOYS = "--case toy --budget 0.01 --gate case"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of an actual run, and of a model."""
    file = tmp_path_factory.mktemp("report") / "rows.jsonl"
    model = (
        "bench.model --model tiny --layers 1 --weights float32 --prompts 8 --contexts 16 --rounds 1 --histories 16,32"
    )
    for command in (f"bench.ops int4_matmul --served --impl dense --impl prefill {TOYS}", model):
        name, *words = command.split()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words, "--out", str(file)])
            assert import_module(name).main() == 0
    return file


def page(*files: Path) -> str:
    return report.render_report(files)


def words(html: str) -> str:
    """Return the text of a page without its tags, in one line."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html)))


def test_page_is_self_contained_and_shows_every_number(measured: Path) -> None:
    html = page(measured)
    seen, found = words(html), list(rows.read(measured))
    assert {row["kind"] for row in found} == {"ceiling", "op", "refused", "model"}
    for row in found:
        if row["kind"] == "op":
            figures = [format_seconds(row["seconds"]), f"{row['bytes_share']:.1%}", f"{row['flops_share']:.1%}"]
            assert f"{row['impl']} {format_config(row['config'])}".strip() in seen
        elif row["kind"] == "refused":
            figures = [row["reason"]]
        elif row["kind"] == "model":
            figures = [format_seconds(row["seconds"])] if "seconds" in row else [f"{row['peak_bytes'] / 2**20:.1f} MiB"]
        else:
            figures = [f"{row['bandwidth'] / 1e9:.1f} GB/s"]
        assert [figure for figure in figures if re.sub(r"\s+", " ", figure).strip() not in seen] == []
    assert all(found[0][field] in seen for field in rows.STAMP)
    assert "NOT MET" in seen or "MET" in seen
    assert html.count("<img") >= 3 and html.count('src="data:') == html.count("src=")
    assert "http" not in re.sub(r'src="data:[^"]*"', "", html) and "<script" not in html


def test_truncated_row_costs_only_itself(measured: Path, tmp_path: Path) -> None:
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(measured.read_bytes())
    os.truncate(copy, copy.stat().st_size - 20)
    assert report.main([str(copy), "--out", str(tmp_path / "report.html")]) == 0
    whole = list(rows.read(measured))
    assert len(list(rows.read(copy))) == len(whole) - 1
    assert (
        format_seconds(next(row["seconds"] for row in whole if row["kind"] == "op"))
        in (tmp_path / "report.html").read_text()
    )


def test_unknown_and_old_rows_are_listed(measured: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    strange: list[dict[str, Any]] = [{"kind": "weather", "of": "to<day>"}, {"kind": "op", "op": "rope", "seconds": 1}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*strange, *rows.read(measured)]))
    seen = words(page(file))
    assert "2 rows this page has no place for" in seen and all(json.dumps(row) in seen for row in strange)


def test_runs_are_separate_and_correctness_and_searches_have_tables(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    here = dict(zip(rows.STAMP, ("GPU one", "2.11", "3.6", "3.12", "abc", "2026-11-28")))
    tuned = {"kind": "tune", "op": "swiglu", "impl": "triton", "sizes": {"s": 8}, "timer": "gpu", "status": "timed"}
    served = {"kind": "serve", "what": "streams", "model": "m", "dtype": "float32", "choice": "vila-triton"}
    served |= {"ttft": 0.25, "ttft_p95": 0.5, "tokens_per_s": 75.0, "requests_per_s": 5.5, "right": 0.975, "errors": 3}
    rows.write(
        file,
        [
            {"kind": "correctness", "op": "rope", "state": "right", "reason": "", **here},
            {"kind": "correctness", "op": "rope", "state": "wrong", "reason": "MismatchError: off", **here},
            {"kind": "correctness", "op": "rope", "state": "not reached", "reason": "150 s were over", **here},
            {"kind": "step", "step": "model", "state": "out of time", "seconds": 70.0, "last": "x", **here},
            {**tuned, "config": {"BLOCK": 1}, "seconds": 2e-6, **here},
            {**tuned, "config": {"BLOCK": 2}, "seconds": 1e-6, **here},
            {**served, "streams": 8, "ratio_engine": {"ttft": 0.5, "tpot": 2.0, "tokens_per_s": 0.25}, **here},
            {"kind": "refused", "op": "rope", "reason": "OutOfMemoryError: 20 GiB", **here, "device": "GPU two"},
        ],
    )
    html = page(file)
    seen = words(html)
    assert re.findall("<h1>(.*?)</h1>", html) == ["GPU one", "GPU two"]
    assert (
        "op right wrong not reached rope 1 1 1" in seen
        and "1 x 150 s were over" in seen
        and "MismatchError: off" in seen
        and "model out of time 70.0 s" in seen
    )
    assert re.search(r"8 streams vila-triton 250\.00 ms 500\.00 ms 75\.0 5\.50 97\.5% 3 - - - 0\.50 2\.00 0\.25", seen)
    assert re.search(r"s=8 2 +1\.00 us 2\.00 2", seen) and "1 x OutOfMemoryError: 20 GiB" in seen


def test_page_of_no_rows_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert "bench.report: no rows in" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_line_that_is_no_object_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"kind": "weather"}\n[1, 2]\n')
    assert report.main([str(file), "--out", str(tmp_path / "report.html")]) == 2
    assert "rows.jsonl:2 is not a row" in capsys.readouterr().err and list(tmp_path.iterdir()) == [file]


SPEEDS = "2026-11-29-amd-epyc.jsonl"
STEPS = {
    "prefill 512 tokens": {"what": "prefill", "prompt": 512},
    "decode after 128, batch 1": {"what": "decode", "context": 128},
    "decode after 512, batch 1": {"what": "decode", "context": 512},
    "decode after 128, batch 8": {"what": "decode", "context": 128, "batch": 8},
    "decode after 512, batch 8": {"what": "decode", "context": 512, "batch": 8},
}
WEIGHTS = ("float32", "bfloat16", "int4")


def test_readme_speeds_equal_their_rows() -> None:
    readme = (rows.ROOT / "bench" / "README.md").read_text()
    assert SPEEDS in readme
    found = list(rows.read(rows.RESULTS / SPEEDS, kind="model"))
    for name, step in STEPS.items():
        cells = []
        for weights in WEIGHTS:
            about = {"model": "vila1.5-3b", "layers": 2, "batch": 1, "weights": weights, "choice": "default", **step}
            measured = [row for row in found if about.items() <= row.items()]
            cells += [
                f"{row['seconds'] * 1e3:.{0 if row['seconds'] > 1 else 1}f} "
                f"({row['ratio_hf']:.2f}, {row['ratio_vllm']:.2f})"
                for row in measured
            ] or ["–"]
        assert len(cells) == len(WEIGHTS) and f"| {' | '.join([name, *cells])} |\n" in readme


TRAINING = "2026-11-29-amd-epyc-training.jsonl"


def test_readme_training_steps_equal_their_rows() -> None:
    readme = (rows.ROOT / "bench" / "README.md").read_text()
    assert TRAINING in readme
    found = [row for row in rows.read(rows.RESULTS / TRAINING, kind="training") if row["choice"] == "default"]
    assert len(found) == 2
    for row in found:
        cells = [
            "checkpointed" if row["checkpointed"] else "each layer kept",
            f"{row['seconds']:.2f} ({row['hf_seconds']:.2f})",
            f"{row['peak_bytes'] / 2**20:.1f} ({row['hf_peak_bytes']:.2f})",
            f"{row['kept_bytes'] / 2**20:.1f} ({row['hf_kept_bytes']:.2f})",
        ]
        assert f"| {' | '.join(cells)} |\n" in readme


def test_default_kernels_are_listed_first() -> None:
    found = list(rows.read(rows.RESULTS / SPEEDS, kind="model"))
    shown = report.default_first(sorted(found, key=lambda row: row["choice"] == "default"))
    assert len(shown) == len(found)
    step = ("what", "weights", "batch", "prompt", "history", "context")
    for row, after in pairwise(shown):
        assert after["choice"] != "default" or any(row.get(name) != after.get(name) for name in step)


def test_documented_commands_write_only_ignored_files() -> None:
    written = r"^.*(?:python -m|vila-triton).* (?:build \S+|convert \S+|quantize \S+|--out|--counts) ([\w./-]+)"
    text = "".join(document.read_text() for document in DOCUMENTS)
    targets = {x for x in re.findall(written, text, re.M) if not x.startswith("/") and not x.isupper()}
    assert {"3b", "tiny-int4", "counts.json"} <= targets
    command = ["git", "check-ignore", "--no-index", *targets]
    done = subprocess.run(command, cwd=rows.ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) == targets


SERVING = "2026-11-29-amd-epyc-serve.jsonl"


def test_readme_servers_equal_their_rows() -> None:
    readme = (rows.ROOT / "bench" / "README.md").read_text()
    assert SERVING in readme
    found = [row for row in rows.read(rows.RESULTS / SERVING, kind="serve") if row["choice"] == "vila-triton"]
    assert len(found) >= 5
    for row in found:
        ratios = {
            name: f"({row['ratio_vllm'][name]:.2f}, {row['ratio_engine'][name]:.2f})"
            for name in ("ttft", "latency", "tokens_per_s")
        }
        cells = [
            "int4, bfloat16" if "int4" in row["model"] else row["dtype"],
            f"{row['streams']} at a time" if row["what"] == "streams" else f"{row['rate']:g} a second",
            f"{row['ttft'] * 1e3:.1f} {ratios['ttft']}",
            f"{row['latency'] * 1e3:.0f} {ratios['latency']}",
            f"{row['tpot'] * 1e3:.2f}",
            f"{row['tokens_per_s']:.0f} {ratios['tokens_per_s']}",
            f"{row['right']:.1%}",
            f"{row['other_cores']:.1f}",
        ]
        assert f"| {' | '.join(cells)} |\n" in readme
