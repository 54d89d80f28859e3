"""Whole models timed: every step and runner has its row, limits are as counted by hand, wrong logits get no time."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import model
from bench.measure import model_configs, model_steps, step_cost
from bench.measure.model_steps import ModelStep, peak_bytes, time_runners
from bench.measure.runners import HF, HuggingFaceRunner, VilaTritonRunner, build_model, logits_error
from bench.measure.timing import MachinePeaks
from bench.measure.vllm_runner import VllmRunner
from vila_triton.registry import OPS, REFERENCE, Impl, Unsupported

CPU = torch.device("cpu")
BANDWIDTH = 1e9
SHORT = ["--model", "tiny", "--layers", "2", "--prompts", "8", "--histories", "16", "--contexts", "20", "--rounds", "3"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Any:
    """Run the command: (exit code, stdout, stderr, rows). The bandwidth is given, not measured."""
    monkeypatch.setattr(model, "measure_peaks", lambda device, dtypes: MachinePeaks(BANDWIDTH, {}))

    def run(*args: str) -> tuple[int, str, str, list[dict[str, Any]]]:
        file = tmp_path / "rows.jsonl"
        file.unlink(missing_ok=True)
        code = model.main([*SHORT, "--device", "cpu", "--out", str(file), *args])
        lines = file.read_text().splitlines() if file.exists() else []
        return code, *capsys.readouterr(), [json.loads(line) for line in lines]

    return run


def test_every_step_has_a_row_for_every_runner(run: Any) -> None:
    code, out, _, rows = run("--weights", "float32,int4", "--choice", "default", "--choice", "int4_matmul=aten")
    assert code == 0
    made = {(row["what"], row["weights"], row["choice"]) for row in rows}
    ours = [("float32", "default"), ("int4", "default"), ("int4", "int4_matmul=aten")]
    ways = [*ours, ("float32", HF), ("int4", f"{HF}, dequantized")]
    assert made == {(what, *way) for what in ("prefill", "streaming", "decode", "memory") for way in ways}
    assert len(rows) == len(made)
    for row in rows:
        assert row["kind"] == "model" and row["model"] == "tiny" and row["layers"] == 2 and row["batch"] == 1
        assert {"device", "torch", "triton", "python", "commit", "date"} <= set(row)
        assert row["dtype"] == ("float32" if row["weights"] == "float32" else "bfloat16")
        if row["what"] == "memory":
            assert row["peak_bytes"] > 0
            continue
        assert 0 < row["low"] <= row["seconds"] <= row["high"] and row["rounds"] == 3
        assert (row["ratio_hf"] == 1) == row["choice"].startswith(HF)
        tokens = {"prefill": 8, "streaming": 32, "decode": 1}[row["what"]]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["seconds"])
    assert rows[0]["ratio_first"] == 1
    assert "no time" not in out and "decode: batch 1, context 20" in out


def test_step_limits_follow_from_the_model_config(run: Any) -> None:
    """Each weight once, keys and values of every token once, read or written; over the bandwidth."""
    *_, rows = run("--weights", "float32,int4", "--batches", "3")
    layers, e, f, v, h, g, d, context = 2, 256, 512, 128, 8, 2, 32, 20
    linears = layers * (2 * e * h * d + 2 * e * g * d + 3 * e * f)
    past = 3 * context * 2 * layers * g * d
    by_hand = {
        "float32": 4 * (linears + v * e + past),
        "int4": linears // 2 + 2 * 2 * linears // 128 + 2 * (v * e + past),
    }
    decode = [(row, row["limit_seconds"]) for row in rows if row["what"] == "decode"]
    assert {row["weights"]: limit for row, limit in decode if row["choice"] == "default"} == {
        weights: pytest.approx(by_hand[weights] / BANDWIDTH) for weights in ("float32", "int4")
    }
    theirs = {row["choice"]: limit for row, limit in decode if row["choice"].startswith(HF)}
    assert theirs[HF] == pytest.approx(by_hand["float32"] / BANDWIDTH)
    assert theirs[f"{HF}, dequantized"] == pytest.approx(by_hand["float32"] / 2 / BANDWIDTH)


def test_runner_with_wrong_logits_gets_no_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that is a little off is named and not timed; the others are, and the exit code says so."""
    planted = Impl("swiglu", "leaky", lambda gate, up: OPS["swiglu"].reference(gate, up) * 1.001, ({},), Path(__file__))
    monkeypatch.setitem(OPS["swiglu"].impls, "leaky", planted)
    code, out, _, rows = run("--weights", "float32", "--choice", "swiglu=leaky", "--choice", "default")
    assert code == 1 and "float32 swiglu=leaky: no time, the logits of a prefill are off by" in out
    assert {row["choice"] for row in rows if row["kind"] == "model"} == {"default", HF}
    (refused,) = [row for row in rows if row["kind"] == "refused"]
    assert refused["choice"] == "swiglu=leaky" and "are off by" in refused["reason"]


def test_unsupported_kernel_choice_is_reported(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise Unsupported("rms_norm: not on Mondays")

    monkeypatch.setitem(OPS["rms_norm"].impls, "monday", Impl("rms_norm", "monday", refuse, ({},), Path(__file__)))
    code, out, _, rows = run("--weights", "float32", "--choice", "rms_norm=monday", "--baseline", "none")
    assert code == 1 and [row["kind"] for row in rows] == ["refused"]
    assert "no time, unsupported: rms_norm: not on Mondays" in out


def test_runner_out_of_memory_at_a_step_gets_a_row_and_the_others_times(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one kind of step it fails in the middle of its turns; its other steps are timed."""

    def full(self: HuggingFaceRunner, state: Any, ids: Tensor) -> Tensor:
        if ids.shape[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return step(self, state, ids)

    step = HuggingFaceRunner.step
    monkeypatch.setattr(HuggingFaceRunner, "step", full)
    code, out, _, rows = run("--weights", "float32", "--batches", "1,3")
    refused = [row for row in rows if row["kind"] == "refused"]
    assert code == 1 and "no time: OutOfMemoryError: CUDA out of memory" in out
    assert [(row["what"], row["batch"], row["choice"]) for row in refused] == [("decode", 3, HF)]
    timed = {(row["choice"], row["what"], row["batch"]) for row in rows if row["kind"] == "model"}
    assert {("default", "decode", 3), (HF, "decode", 1), (HF, "prefill", 1)} <= timed


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int4"])
def test_logits_error_passes_right_runners_and_sees_wrong_ones(weights: str) -> None:
    """Hugging Face's model too; and it sees a decode step that rotates by the wrong position (and, where rounding to
    int4 hides that, takes the wrong token)."""
    made = build_model(model_configs.load_model("tiny", 2).llm, weights, CPU)
    ids = torch.arange(24)
    assert [
        logits_error(runner, ids)
        for runner in (VilaTritonRunner(made, "default"), VilaTritonRunner(made, REFERENCE), HuggingFaceRunner(made))
    ] == [None] * 3
    late = HuggingFaceRunner(made)
    step = late.step
    late.step = lambda state, ids: step(state, ids) if ids.shape[1] > 1 else late.net(  # pyright: ignore
        ids + (weights == "int4"), past_key_values=state, position_ids=torch.tensor([[5]])
    ).logits[:, -1]  # fmt: skip
    assert "decode" in str(logits_error(late, ids))


class Counting:
    """A runner that only writes down its turns."""

    own_seconds: float | None = None

    def __init__(self, name: str, turns: list[str]):
        self.model = build_model(model_configs.load_model("tiny", 1).llm, "float32", CPU)
        self.name, self.turns, self.length = name, turns, 0
        self.weights, self.weight_config = [], self.model.cfg

    def start(self, batch: int, capacity: int) -> None:
        self.length = 0

    def step(self, state: None, ids: Tensor) -> Tensor:
        self.turns.append(f"{self.name}{self.length}")
        self.length += ids.shape[1]
        return ids

    def truncate(self, state: None, length: int) -> None:
        self.length = length


def test_runners_take_turns_and_start_each_from_the_same_cache() -> None:
    turns: list[str] = []
    found = time_runners([Counting("a", turns), Counting("b", turns)], ModelStep("decode", 2, 1, 6), 2, CPU)
    assert turns[:2] == ["a0", "b0"]  # the history
    assert turns[2:] == ["b6", "a6", "a6", "b6", "b6", "a6"]
    assert [len(mine) for mine in found] == [2, 2]


FAKE_VLLM = """#!{python}
import json, sys, torch
folder, tokens = sys.argv[2], []
print("{{}}", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    print(line, file=open(folder + "/asked", "a"))
    if "prompts" in request:
        tokens = [len(prompt) for prompt in request["prompts"]]
    torch.save(torch.ones(len(tokens), 5), folder + "/logits.pt")
    print(json.dumps({{"seconds": 0.25, "tokens": sum(tokens)}}), flush=True)
    tokens = [1] * len(tokens)
    if tokens[2:]:
        sys.exit("three are too many")
"""


def test_vllm_is_asked_for_the_same_tokens_and_timed_by_its_own_clock(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(FAKE_VLLM.format(python=sys.executable))
    python.chmod(0o755)
    made = build_model(model_configs.load_model("tiny", 1).llm, "float32", CPU)
    runner = VllmRunner(made, python, 64)
    try:
        (seconds,) = time_runners([runner], ModelStep("decode", 2, 1, 6), 2, CPU)
        assert seconds == [0.25, 0.25]
        asked = [json.loads(line) for line in (runner.folder / "asked").read_text().split("\n") if line]
        cached, new = model_steps.random_tokens(runner, 2, 7).split([6, 1], 1)
        assert asked[0] == {"prompts": cached.tolist(), "then": [0, 0], "steps": 1}
        assert asked[1] == {"prompts": cached.tolist(), "then": new[:, 0].tolist(), "steps": 1}
        assert asked[2:] == [{"steps": 1}] * 3
        state = runner.start(3, 4)
        assert runner.step(state, torch.zeros(3, 4, dtype=torch.int64)).shape == (3, 5)
        with pytest.raises(RuntimeError, match="vLLM ended: three are too many"):
            runner.step(state, torch.zeros(3, 1, dtype=torch.int64))
    finally:
        runner.close()
    assert not runner.folder.exists()
    with pytest.raises(ValueError, match="dense weights"):
        VllmRunner(build_model(model_configs.load_model("tiny", 1).llm, "int4", CPU), python, 64)


def test_peak_memory_counts_cache_and_activations_without_weights() -> None:
    made = build_model(model_configs.load_model("tiny", 2).llm, "float32", CPU)
    short, long = (peak_bytes(VilaTritonRunner(made, "default"), ModelStep("memory", 1, n, 0), CPU) for n in (64, 640))
    cache = step_cost.kv_bytes_per_token(made.cfg, torch.float32)
    assert 64 * cache < short < 64 * cache + 2 * 2**20
    assert long - short > 576 * cache


def test_published_lines_are_context_only() -> None:
    lines = list(model.published_lines("vila1.5-3b"))
    assert "not measured here" in lines[0] and any("A100" in x and "int4" in x and "5.47" in x for x in lines)
    assert not list(model.published_lines("tiny"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nope"], "no model 'nope'"),
        (["--weights", "int3"], "no weights int3; there are: float32"),
        (["--choice", "rope=fast"], "there are: reference"),
        (["--choice", "fast"], "expected kernels.OP=NAME"),
        (["--prompts", "5000"], "5000 tokens, but tiny was made for 4096"),
    ],
)
def test_model_bad_arguments_are_one_line(run: Any, args: list[str], message: str) -> None:
    code, _, err, rows = run(*args)
    assert code == 2 and message in err and err.count("\n") == 1 and not rows


def test_model_steps_are_named_as_in_their_rows() -> None:
    found = list(model_steps.plan_steps([8], [16], [1, 2], [20]))
    assert [step.kind for step in found] == ["prefill", "streaming", "decode", "decode", "memory"]
    assert found[1].labels == {"batch": 1, "prompt": 32, "history": 16} and found[3].labels == {
        "batch": 2,
        "context": 20,
    }
