"""The suite's plan fits its time, keeps what is most valuable, and leaves neither half a row nor a process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import gone

from bench import _suite_estimate as suite_estimate
from bench import suite
from bench.measure import goals_attention, rows, suite_plan
from bench.measure.cases import cases
from bench.measure.suite_plan import SuiteStep, allot_seconds, left_out_lines, suite_steps

OUT = Path("/out")
VALUABLE = {"correctness", "int4 goals", "prefill goals", "decode goals", "goals", "report"}


def seconds(minutes: float) -> float:
    return 60 * minutes - suite.OWN_SECONDS


@pytest.mark.parametrize("minutes", [1, 4, 9, 12, 30])
def test_limits_fit_the_time_and_least_valuable_steps_are_left_out(minutes: float) -> None:
    every = suite_steps(OUT, toy=False)
    limits = allot_seconds(every, seconds(minutes))
    assert sum(limits.values()) <= seconds(minutes) + 1e-6
    ranked = sorted(every, key=lambda step: step.priority)
    assert [step.name for step in ranked[: len(limits)]] == list(limits)
    assert all(step.min_seconds <= limits[step.name] <= step.max_seconds for step in ranked[: len(limits)])
    said = list(left_out_lines(every, seconds(minutes)))
    assert len(said) == len(every) - len(limits) and all(": left out, it needs" in line for line in said)


def test_four_minutes_keep_the_most_valuable_steps() -> None:
    assert allot_seconds(suite_steps(OUT, toy=False), seconds(4)).keys() == VALUABLE


def test_twelve_minutes_suffice_for_model_searches_and_plots() -> None:
    every = suite_steps(OUT, toy=False)
    limits = allot_seconds(every, seconds(12))
    kept = [step for step in every if step.name in limits]
    assert {
        *VALUABLE,
        "model",
        "tune int4 decode",
        "tune int4 prefill",
        "tune decode attention",
        "plots",
    } <= limits.keys()
    assert [step.name for step in every][-2:] == ["plots", "report"]
    for step in kept:
        counts = suite_estimate.count_step(step, limits[step.name], kept)
        assert suite_estimate.total_seconds(counts) <= limits[step.name], f"{step.name}: {dict(counts)}"


def test_estimated_counts_equal_those_of_the_plan() -> None:
    """Three implementations at every case of the goals; two weights and two runners at every step of the model."""
    every = suite_steps(OUT, toy=False)
    step = {step.name: step for step in every}
    counts = suite_estimate.count_step(step["int4 goals"], 60, every)
    served = [suite_estimate.default_impl(case)[0] for case in cases("int4_matmul", "goals")]
    assert counts["figure"] == 3 * len(served) - served.count("dequant")  # which is timed beside the others anyway
    assert set(served) == {"splitk", "prefill", "dequant"}
    few = suite_estimate.count_step(step["tune prefill attention"], 60, every)
    most = int(step["tune prefill attention"].argv[step["tune prefill attention"].argv.index("--candidates") + 1])
    assert few["figure"] <= most * len(cases("prefill_attention", "whole"))


def test_model_steps_are_within_the_context_length() -> None:
    every = {step.name: step for step in suite_steps(OUT, toy=False)}
    _, *words = every["model"].command(100)
    args = suite_estimate.model.parser().parse_args(words)
    longest = suite_estimate.model_configs.load_model(args.model, args.layers).llm.max_position_embeddings
    todo = list(suite_estimate.steps_of_model(args.prompts, args.histories, args.batches, args.contexts))
    assert max(step.cached_tokens + step.new_tokens for step in todo) == longest
    goals = {step.cached_tokens for step in todo if step.kind == "streaming"}
    assert goals_attention.SHORT_HISTORY in goals and max(h for h in goals if h <= 1024) == 1024


def test_rehearsal_has_the_same_steps() -> None:
    real, toy = suite_steps(OUT, toy=False), suite_steps(OUT, toy=True)
    assert [(step.name, step.priority) for step in real] == [(step.name, step.priority) for step in toy]
    assert [step.argv[0] for step in real] == [step.argv[0] for step in toy]
    assert allot_seconds(toy, seconds(5)).keys() == {step.name for step in toy}


STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, {handler})
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps are files of a folder here, in place of modules."""
    monkeypatch.setattr(suite, "PYTHON_COMMAND", [sys.executable])
    monkeypatch.setattr(suite_plan, "MARGIN_SECONDS", 0.0)
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.mark.parametrize("handler", ["lambda *_: sys.exit(0)", "signal.SIG_IGN"])
def test_step_is_terminated_then_killed_with_its_children(scripts: Path, handler: str) -> None:
    (scripts / "step.py").write_text(STUBBORN.format(handler=handler))
    step = SuiteStep("stubborn", 1, 0, 4, [str(scripts / "step.py")])
    start = time.perf_counter()
    outcome = suite.run_step(step, 4, scripts / "log")
    assert outcome.state == "out of time" and time.perf_counter() - start < 6
    child = int(outcome.last_line)
    assert gone(child)


def test_unused_time_goes_to_the_next_step_and_summary_is_always_written(scripts: Path) -> None:
    (scripts / "quick.py").write_text("print('done')")
    (scripts / "fails.py").write_text("raise SystemExit('broken')")
    (scripts / "slow.py").write_text("import time; time.sleep(600)")
    of = {name: [str(scripts / f"{name}.py")] for name in ("quick", "fails", "slow")}
    every = [
        SuiteStep("first", 1, 1, 20, of["quick"]),
        SuiteStep("second", 2, 1, 20, of["fails"]),
        SuiteStep("last", 3, 1, 3, of["slow"]),
        SuiteStep("huge", 4, 100, 100, of["quick"]),
    ]
    outcomes = suite.run_plan(every, 22, scripts)
    assert [outcome.state for outcome in outcomes] == ["ok", "failed", "out of time", "left out"]
    text = (scripts / "summary.txt").read_text()
    assert "done" in text and "broken" in text and "left out, it needs 100 s" in text
    states = [row["state"] for row in rows.read(scripts / "rows.jsonl", kind="step")]
    assert states == [outcome.state for outcome in outcomes]


def test_suite_stopped_by_a_signal_ends_its_step_and_sums_up(tmp_path: Path) -> None:
    code = f"""
import signal, sys
from pathlib import Path
from bench import suite
from bench.measure.suite_plan import SuiteStep
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
suite.PYTHON_COMMAND = [sys.executable]
out = Path({str(tmp_path)!r})
(out / "logs").mkdir()
suite.run_plan([SuiteStep("a", 1, 1, 600, [str(out / "step.py")])], 600, out)
"""
    (tmp_path / "step.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=rows.ROOT)
    log = tmp_path / "logs" / "1-a.log"
    while not (log.exists() and log.read_text().strip().splitlines()[-1:] and log.read_text().split()[-1].isdigit()):
        time.sleep(0.1)
        assert process.poll() is None
    child = int(log.read_text().split()[-1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143 and gone(child)
    assert "stopped" in (tmp_path / "summary.txt").read_text()


def test_truncated_row_is_left_out_and_the_next_one_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows.write(file, [{"kind": "a", "n": 1}, {"kind": "a", "n": 2}])
    os.truncate(file, file.stat().st_size - 5)
    assert [row["n"] for row in rows.read(file)] == [1]
    assert "rows.jsonl:2 was cut off in the middle and is left out" in capsys.readouterr().err
    rows.write(file, [{"kind": "a", "n": 3}])
    assert [row["n"] for row in rows.read(file)] == [1, 3] and not capsys.readouterr().err
    os.truncate(file, file.stat().st_size - 1)  # a whole row, without the end of its line
    assert [row["n"] for row in rows.read(file)] == [1, 3]
    rows.write(file, [{"kind": "a", "n": 4}])
    assert [row["n"] for row in rows.read(file)] == [1, 3, 4] and not capsys.readouterr().err
