"""Figures from rows: every kind is drawn, the same each time, with its stamp; what would mislead is refused."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bench import plot, prefill_memory, quality
from bench.measure import rows
from bench.plots import ops, tuning
from bench.plots.style import save_figure

HERE = {
    "device": "Imaginary GPU 9000",
    "date": "2026-01-02",
    "commit": "0123456789ab",
    "torch": "2.13",
    "triton": "3.7",
}


def op_rows() -> Iterator[dict[str, Any]]:
    yield {"kind": "ceiling", "bandwidth": 1e12, "flops": {"float16": 1e14, "float32": 1e13}}
    for case, m in (("decode", 1), ("decode", 4), ("prefill", 64), ("prefill", 256)):
        for (n, G), (impl, factor, peer) in itertools.product(
            ((256, 2), (512, 4)), (("reference", 8, False), ("triton", 2, False), ("gemlite", 3, True))
        ):
            k, sizes = G * 128, {"m": m, "n": n, "G": G, "group": 128, "dtype": "float16"}
            cost = {"flops": 2 * m * n * k, "bytes": n * k // 2 + 2 * m * (n + k)}
            seconds = factor * max(cost["flops"] / 1e14, cost["bytes"] / 1e12)
            about = {
                "op": "int4_matmul",
                "impl": impl,
                "case": case,
                "sizes": sizes,
                "config": {},
                "peer": peer,
                "cold": m > 1,
            }
            yield {"kind": "op", **about, "seconds": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds, **cost}


def tune_rows() -> Iterator[dict[str, Any]]:
    for m, n, stages in itertools.product((16, 32, 64), (32, 64), (1, 2)):
        about = {"op": "int4_matmul", "impl": "triton", "sizes": {"m": 1, "n": 256}, "timer": "gpu", "reason": None}
        row = {"kind": "tune", **about, "config": {"BLOCK_M": m, "BLOCK_N": n, "num_stages": stages}, "seconds": None}
        if m == 64:
            yield {**row, "status": "compile" if n == 64 else "cost", "reason": "spills"}
        else:
            yield {**row, "status": "timed", "seconds": 1e-5 * m / n * (1 + stages / 50)}


def model_rows() -> Iterator[dict[str, Any]]:
    for choice, weights in (("reference", "float32"), ("aten", "float32"), ("aten", "int4"), ("hf eager", "float32")):
        about = {"kind": "model", "model": "vila1.5-3b", "layers": 2, "weights": weights, "choice": choice}
        for prompt in (32, 128):
            yield {**about, "what": "prefill", "batch": 1, "prompt": prompt, "seconds": prompt / 1e3}
            yield {**about, "what": "memory", "batch": 1, "prompt": prompt, "peak_bytes": prompt * 10**6}
            yield {**about, "what": "streaming", "batch": 1, "prompt": 32, "history": prompt, "seconds": 0.03}
        for batch, context in itertools.product((1, 4), (64, 256)):
            rate = {"tokens_per_s": 30 * batch, "limit_seconds": 1 / 50}
            yield {**about, "what": "decode", "batch": batch, "context": context, **rate}


def quality_rows() -> Iterator[dict[str, Any]]:
    for method, group in (("float32", 0), *itertools.product(("rtn", "awq-gptq"), (32, 64))):
        about = {"kind": "quality", "model": "m", "method": method, "group": group, "samples": 4, "seed": 0}
        yield {**about, "kl": group / 1e3 / len(method), "perplexity": 2.0}


def memory_rows() -> Iterator[dict[str, Any]]:
    for length, chunk in itertools.product((64, 256), (0, 32)):
        about = {"kind": "memory", "choice": "default", "layers": 4, "length": length, "chunk": chunk}
        yield {**about, "cache": length * 512, "peak": (chunk or length) * 9000}


def predict_rows() -> Iterator[dict[str, Any]]:
    for gpu, weights, beyond in (("H100", "float16", None), ("H100", "int4", None), ("4090", "float16", "memory")):
        about = {"kind": "predict", "gpu": gpu, "source": "datasheet", "model": "vila1.5-40b", "weights": weights}
        yield {**about, "what": "prefill", "images": 1, "prompt": 32, "seconds": 0.03, "beyond": beyond}
        yield {**about, "what": "decode", "context": 256, "seconds": 0.02, "beyond": beyond}


def training_rows() -> Iterator[dict[str, Any]]:
    for choice, checkpointed, weights in itertools.product(("default", "hf eager"), (False, True), ("float32", "int4")):
        about = {"kind": "training", "model": "vila1.5-3b", "layers": 2, "weights": weights, "choice": choice}
        figures = {"seconds": 4.0 + checkpointed, "peak_bytes": 10**9, "kept_bytes": 10 ** (8 - checkpointed)}
        yield {**about, "checkpointed": checkpointed, "batch": 1, "tokens": 512, **figures}


def serve_rows() -> Iterator[dict[str, Any]]:
    for load, choice in itertools.product((1, 2, 16), ("vila-triton", "vllm's kernels", "engine")):
        times = {"ttft": 0.01 * load, "ttft_p95": 0.02 * load, "tpot": 0.003, "tpot_p95": 0.004}
        about = {"kind": "serve", "model": "tiny/checkpoint", "dtype": "float32", "choice": choice, **times}
        yield {**about, "what": "streams", "streams": load, "tokens_per_s": 100.0 * load}
        yield {**about, "what": "arrivals", "rate": load * 1.5, "tokens_per_s": 90.0 * load}
    yield {**about, "what": "streams", "streams": 4, "tokens_per_s": 0.0, "choice": "one that fails"}


SOURCES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "roofline": op_rows, "time": op_rows, "speedup": op_rows, "tuning": tune_rows,
    "memory": memory_rows, "model": model_rows, "predict": predict_rows, "quality": quality_rows,
    "training": training_rows, "serve": serve_rows,
}  # fmt: skip


def written(file: Path, found: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps({**HERE, **row}) + "\n" for row in found))
    return str(file)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The files that `--only name` writes, drawn once for all tests."""

    @cache
    def files(name: str) -> dict[str, bytes]:
        return draw(tmp_path_factory.mktemp(name), name)

    return files


def draw(folder: Path, name: str) -> dict[str, bytes]:
    source = written(folder / "rows.jsonl", list(SOURCES[name]()))
    assert plot.main([source, "--only", name, "--out", str(folder / "out")]) == 0
    return {file.name: file.read_bytes() for file in sorted((folder / "out").iterdir())}


@pytest.mark.parametrize("name", plot.PLOTS)
def test_figures_carry_their_stamp_and_are_reproducible(
    name: str, drawn: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    files = drawn(name)
    assert files == draw(tmp_path, name)
    assert {Path(file).suffix for file in files} == {".png", ".svg"}
    for file, content in files.items():
        if file.endswith(".svg"):
            assert all(HERE[field] in content.decode() for field in ("device", "date", "commit"))
        assert len(content) > 5000


WORDS = {
    "roofline": ["memory, 1.00 TB/s", "float16, 100 TFLOP/s", "gemlite", "int4_matmul triton m=", "hollow: ", "FLOP/s"],
    "time": ["n=256 G=2", "n=512 G=4", "limit of this machine", "gemlite", "time of a call", " µs"],
    "speedup": ["time of gemlite / time of our fastest", "time of reference / time of our fastest", "1.50", "4.00"],
    "tuning": ["BLOCK_M", "BLOCK_N", "num_stages", "compile", "cost", "1.00", "(gpu)"],
    "memory": ["one pass, default, 4 layers", "chunks of 32, default, 4 layers", "the cache", "iB"],
    "model": ["aten, int4", "hf eager, float32", "limit of memory, int4", "tokens of the history", " MB", "batch 4"],
    "training": ["float32, checkpointed", "hf eager", "ours", "time of a step", " GB", "1 x 512 tokens"],
    "serve": ["engine, 95th percentile", "vllm's kernels, median", "requests at a time", "that come a second", " ms"],
    "predict": ["H100: 1 image, 32 text tokens", "4090: at 256 tokens", "beyond memory", "vila1.5-40b", "bounds"],
}


@pytest.mark.parametrize("name", WORDS)
def test_figures_name_what_they_show(name: str, drawn: Callable[[str], dict[str, bytes]]) -> None:
    text = b" ".join(content for file, content in drawn(name).items() if file.endswith(".svg")).decode()
    assert [word for word in WORDS[name] if word not in re.sub(r"\s", " ", text)] == []


def crowded(name: str) -> list[dict[str, Any]]:
    """Rows in which more sizes than fit lie close together, after one that lies far away; long names; ops alike."""
    found = list(SOURCES[name]())
    if name in ("roofline", "time", "speedup"):
        sizes = [1, *range(4000, 4200, 8), 4201, 4202, 8000]
        one = [row for row in found if row["kind"] == "op" and row["sizes"]["m"] == 64 and row["sizes"]["n"] == 256]
        found += [{**row, "sizes": {**row["sizes"], "m": m}} for row in one for m in sizes]
        found += [{**row, "op": f"another_op_{i}"} for row in one for i in range(5)]
    if name == "memory":
        found += [{**found[0], "length": length} for length in (4096, 4097, 4160, 4200)]
    if name == "model":
        found += [{**found[0], "prompt": n} for n in (100, 126, 127, 129)]
        found += [
            {**found[0], "what": "decode", "tokens_per_s": 3.0, "batch": 1, "context": n} for n in (255, 257, 300)
        ]
    if name == "predict":
        found += [{**row, "gpu": f"H100 of another maker {i}"} for row in found for i in range(4)]
    if name == "serve":
        found += [{**found[0], "streams": n} for n in (3, 17, 18, 19)]
    if name == "tuning":
        found += [{**found[0], "config": {**found[0]["config"], "num_stages": 1000 + i}} for i in range(30)]
    if name == "quality":
        found += [{**found[1], "group": group} for group in (16, 128, 256, 512, 1024)]
    return [{**HERE, **row} for row in found]


def boxes(fig: Figure) -> Iterator[list[tuple[str, Bbox]]]:
    """Texts that may not lie over each other, and where they lie: labels of an axis, titles, numbers in the panels."""
    fig.draw_without_rendering()
    axes = [ax for ax in fig.axes if ax.get_visible()]

    def shown(texts: Sequence[Text]) -> list[tuple[str, Bbox]]:
        return [(x.get_text(), x.get_window_extent()) for x in texts if x.get_text() and x.get_visible()]

    yield shown([x for ax in axes for x in (ax.title, ax._left_title)])  # pyright: ignore[reportAttributeAccessIssue]
    for ax in axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            yield shown([x.label1 for x in axis.get_major_ticks() if low <= x.get_loc() <= high])
        yield shown([text for text in ax.texts if not text.get_rotation()])


@pytest.mark.parametrize("name", plot.PLOTS)
def test_texts_of_figures_do_not_overlap(name: str, tmp_path: Path) -> None:
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in plot.KINDS}
    for row in crowded(name):
        found[row["kind"]].append(row)
    for plotted in plot.PLOTS[name][0](found):
        save_figure(plotted.figure, tmp_path / plotted.name, HERE, suffixes=())  # as it is laid out, without files
        for texts in boxes(plotted.figure):
            for (one, a), (other, b) in itertools.combinations(texts, 2):
                across, up = (min(x1, y1) - max(x0, y0) for x0, x1, y0, y1 in zip(a.min, a.max, b.min, b.max))
                assert min(across, up) < 1, f"{plotted.name}: {one!r} lies over {other!r}"
        for ax in plotted.figure.axes:  # names at an angle, by the distance of their lines
            lines = [x.get_window_extent().min for x in ax.texts if x.get_rotation() == ops.NAME_ANGLE]
            slope = np.radians(ops.NAME_ANGLE)
            across = sorted(x * np.sin(slope) - y * np.cos(slope) for x, y in lines)
            assert all(b - a > 7 for a, b in itertools.pairwise(across)), plotted.name
    plt.close("all")


def test_plot_draws_all_figures_of_a_file_and_names_other_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [{"kind": "refused", "op": "rope"}, *op_rows(), *memory_rows()]
    assert plot.main([written(tmp_path / "rows.jsonl", found), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "1 rows of kind 'refused': there is no figure of these" in text
    assert "tuning    no rows of kind 'tune'" in text and "model     no rows of kind 'model'" in text
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.svg"))) == 4


@pytest.mark.parametrize(("field", "value"), [("device", "Another GPU"), ("date", "2026-01-03"), ("commit", "fedcba")])
def test_plot_refuses_rows_of_two_runs_unless_one_is_chosen(
    field: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "rows.jsonl", [*op_rows(), *({**row, field: value} for row in op_rows())])
    for name in ("roofline", "time", "speedup"):
        assert plot.main([source, "--only", name, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "would mix rows of 2 runs" in error and value in error and HERE[field] in error
    assert not list(tmp_path.glob("*.png"))
    assert plot.main([source, "--only", "roofline", "--out", str(tmp_path), "--run", value]) == 0
    assert (
        value in (tmp_path / "roofline.svg").read_text() and HERE[field] not in (tmp_path / "roofline.svg").read_text()
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"kind": "op", "op": "rope"}], "rows.jsonl:1 is a row 'op' without impl, case, sizes, config, seconds"),
        (
            [{"kind": "model", "what": "guess"}],
            "rows.jsonl:1 is a row 'model guess'; known of this kind are: model pre",
        ),
        ([{"kind": "refused"}, {"seconds": 1}], "rows.jsonl:2 is not a row: it has no field 'kind'"),
        ([{"kind": "refused"}], "nothing was drawn"),
    ],
)
def test_plot_names_rows_it_cannot_draw(
    lines: list[dict[str, Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot.main([written(tmp_path / "rows.jsonl", lines), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_plot_names_bad_arguments_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main([str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert plot.main([str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl:1 is not a row" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "bad.jsonl"), "--only", "pie"]) == 2
    assert "no figure pie; there are: roofline, " in capsys.readouterr().err


def test_plot_uses_the_last_of_repeated_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [{**HERE, **row} for row in op_rows() if row["kind"] == "op"]
    file = Path(written(tmp_path / "rows.jsonl", [*found, {**found[0], "seconds": 7.0}]))
    loaded = plot.load_rows([file], "")["op"]
    assert len(loaded) == len(found) and sum(row["seconds"] == 7.0 for row in loaded) == 1
    assert "1 rows were measured again" in capsys.readouterr().out


def test_resumed_search_is_one_run_and_two_searches_are_two_figures(tmp_path: Path) -> None:
    found = list(tune_rows())
    resumed = [{"kind": "search"}, *found[:5], *({**row, "date": "2026-01-03"} for row in found[5:])]
    files = [Path(written(tmp_path / name, resumed)) for name in ("a.jsonl", "b.jsonl")]
    shown = list(tuning.plot_tuning(plot.load_rows(files, "")))
    assert [plotted.name for plotted in shown] == ["tuning-int4_matmul-triton-1", "tuning-int4_matmul-triton-2"]
    assert [plot.single_run_stamp(plotted)["date"] for plotted in shown] == ["2026-01-03", "2026-01-03"]
    plt.close("all")


def test_numbers_in_the_figures_are_those_of_the_rows() -> None:
    found = [row for row in op_rows() if row["kind"] == "op"]
    (shapes,) = ops.group_by_sweep(found).values()
    assert [dict(shape)["n"] for shape in shapes] == [256, 512]  # both cases of a shape in one line
    np.testing.assert_allclose(ops.speedup_table(shapes, "m", [1, 4, 64, 256], "gemlite"), 1.5)
    assert np.isnan(ops.speedup_table(shapes, "m", [5], "gemlite")).all()
    slower = {**found[0], "config": {"BLOCK": 1}, "seconds": 99.0}  # of several configs the fastest is drawn
    assert ops.group_by_sweep([*found, slower]) == ops.group_by_sweep(found) == ops.group_by_sweep([slower, *found])
    timed = [row for row in tune_rows() if row["status"] == "timed"]
    assert tuning.setting_effect(timed, "BLOCK_M") == pytest.approx(2) and tuning.setting_effect(
        timed, "BLOCK_N"
    ) == pytest.approx(2)


def test_prefill_memory_writes_rows_that_plot_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--lengths", "16", "32", "--chunks", "0", "16", "--layers", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["bench.prefill_memory", *options])
    prefill_memory.main()
    assert len(list(rows.read(out, kind="memory"))) == 4
    assert plot.main([str(out), "--out", str(tmp_path)]) == 0 and (tmp_path / "memory.png").exists()


def test_old_names_of_quality_methods_mean_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    old_rows = [{"kind": "quality", "method": method} for method in ("rtn", "upstream", "ours")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in old_rows))
    assert tuple(row["method"] for row in rows.read(file)) == quality.METHODS

    def fake_rows(subject: str, methods: list[str], groups: list[int]) -> Iterator[dict[str, Any]]:
        for method in methods:
            yield {"model": subject, "method": method, "group": 64, "perplexity": 1, "kl": 0, "right": 1, "kinds": {}}

    monkeypatch.setattr(quality, "load_subject", lambda name, samples, seed: name)
    monkeypatch.setattr(quality, "quality_rows", fake_rows)
    monkeypatch.setattr("sys.argv", ["bench.quality", "--model", "bundled", "--methods", "ours", "upstream", "rtn"])
    assert quality.main() == 0
    printed = capsys.readouterr()
    assert [line.split()[1] for line in printed.out.splitlines()[1:]] == ["awq-gptq", "llm-awq", "rtn"]
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["note", "note"]
