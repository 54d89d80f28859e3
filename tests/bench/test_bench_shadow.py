"""`bench.shadow` runs a candidate beside what a model runs, names the first layer that is off, and what it costs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import Plant, plant  # noqa: F401 (plant: a fixture)
from torch import Tensor

from bench import check, shadow
from bench.correctness import shadow_recorder
from bench.correctness.error_budget import example_args
from bench.correctness.guarded_memory import map_tensors
from bench.correctness.shadow_recorder import ShadowRecorder
from bench.measure import prompts, rows
from vila_triton.chat.conversation import ChatModel
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.ops import Int4
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import OPS, Impl, Unsupported, use

ONE = ["--count", "1", "--tokens", "2"]
LINEARS = 5  # int4 products of a layer


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable], None]:
    """attach(op, fn): fn is the implementation "candidate" of the op, until the test ends."""

    def set_impl(op: str, fn: Callable) -> None:
        monkeypatch.setitem(OPS[op].impls, "candidate", Impl(op, "candidate", fn, [{}], Path(__file__)))

    return set_impl


def test_reference_in_its_own_shadow_is_equal(capsys) -> None:
    with use(int4_matmul="reference"):
        assert shadow.main(["--op", "int4_matmul", "--impl", "reference", *ONE]) == 0
    said = capsys.readouterr().out
    assert "reference beside reference; checkpoint-int4" in said and "first layer beyond budget: none" in said
    assert "KL divergence 0.00e+00 nats on average, 0.00e+00 at most; 0 argmax flips" in said
    assert all(f"llm.layers[{i}].{name} " in said for i in range(4) for name in ("qkv", "o", "gate", "up", "down"))


def test_first_wrong_layer_is_named_and_its_worst_call_replayed(attach: Any, tmp_path: Path, capsys) -> None:
    calls = []

    def wrong_from_layer_2_on(x: Tensor, w: Int4, *terms: Tensor | None) -> Tensor:
        calls.append(x)
        out = OPS["int4_matmul"].reference(x, w, *terms)
        return out if len(calls) <= 2 * LINEARS + 3 else out * 1.5

    attach("int4_matmul", wrong_from_layer_2_on)
    saved, file = tmp_path / "worst", tmp_path / "rows.jsonl"
    argv = ["--op", "int4_matmul", "--impl", "candidate", *ONE, "--save", str(saved), "--json", str(file)]
    assert shadow.main(argv) == 1
    said = capsys.readouterr().out
    assert "first layer beyond budget: llm.layers[2].up, prefill" in said
    assert f"--replay {saved}" in said
    assert check.main(["--replay", str(saved)]) == 1
    assert "from bench.shadow: llm.layers[" in capsys.readouterr().out
    attach("int4_matmul", OPS["int4_matmul"].reference)  # mended
    assert check.main(["--replay", str(saved)]) == 0
    *layers, whole = rows.read(file, kind="shadow")
    wrong = [row["layer"] for row in layers if row["budget_multiple"] > 1]
    assert (
        len(layers) == 4 * LINEARS and len(wrong) == 4 * LINEARS
    )  # those before it in decode, when it was wrong always
    assert whole["flips"][0] and max(whole["divergence"][0]) > 1e-3


def talker(name: str = "checkpoint") -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT.with_name(name), "cpu")


def test_recording_does_not_change_the_model(attach: Any) -> None:
    def wrong(q: Tensor, k: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return OPS["rope_kv_write"].reference(q, k * 2, *args)

    attach("rope_kv_write", wrong)
    model, (prompt,) = talker(), prompts.bundled_prompts(1, 0)
    plain, tokens, prefilled = shadow.run_prompt(model, prompt, 3)
    impls = {name: dict(op.impls) for name, op in OPS.items()}
    watcher, incumbents, shifts = shadow.run_shadow(model, OPS["rope_kv_write"].impls["candidate"], [prompt], 3, [])
    assert {name: dict(op.impls) for name, op in OPS.items()} == impls
    watched = ShadowRecorder(OPS["rope_kv_write"], OPS["rope_kv_write"].impls["candidate"], model.model.params)
    with watched.recording():
        assert torch.equal(shadow.run_prompt(model, prompt, 3, recorder=watched)[0], plain)
    assert prefilled + len(tokens) == len(plain) and incumbents == {"reference"}
    assert watcher.first_failure == "llm.layers[0], prefill" and not isinstance(shifts, str)
    assert list(watcher.layers) == [f"llm.layers[{i}]" for i in range(4)]
    for line in watcher.layers.values():  # doubling a number is 2**10 steps of float16
        assert line.calls == 1 + len(tokens) and line.failure and line.ulps["64+"] > 0 and line.ulps["NaN"] == 0


def test_candidate_of_an_in_place_op_gets_copies(attach: Any) -> None:
    seen: list[Tensor] = []

    def scribbles(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(k_pages.clone())
        return k_pages.fill_(7), v_pages.fill_(7)

    attach("kv_write", scribbles)
    op = OPS["kv_write"]
    args = example_args(op, seed=0, s=4, g=1, d=16, l=16, dtype="float32")
    before, expected = map_tensors(torch.clone, args), op.reference(*map_tensors(torch.clone, args))
    watcher = ShadowRecorder(op, op.impls["candidate"], None)
    with watcher.recording():
        result = op(*args)
    assert watcher.worst and torch.equal(seen[0], before[2])
    for kept, was, written, want in zip(watcher.worst.args[2:4], before[2:4], result, expected):
        assert torch.equal(kept, was) and torch.equal(written, want)


def test_copied_kernel_file_is_shadowed(plant: Plant, capsys) -> None:  # noqa: F811
    plant("rms_norm", "mine")
    assert (
        shadow.main(["--op", "rms_norm", "--impl", "mine", "--layers", "layers[1]", "--count", "1", "--tokens", "0"])
        == 0
    )
    said = capsys.readouterr().out
    assert "rms_norm: mine beside reference" in said and "llm.layers[1]." in said and "llm.layers[0]." not in said


def refuses(*args: object) -> None:
    raise Unsupported("not on a Tuesday")


def narrow(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return OPS["rms_norm"].reference(x, weight, eps)[:1]


@pytest.mark.parametrize("fn, message", [(refuses, "Unsupported: not on a Tuesday"), (narrow, "returned [([1, 256]")])
def test_failing_candidate_is_reported(fn: Callable, message: str, attach: Any, tmp_path: Path, capsys) -> None:
    attach("rms_norm", fn)
    saved = tmp_path / "worst"
    assert shadow.main(["--op", "rms_norm", "--impl", "candidate", *ONE, "--save", str(saved)]) == 1
    said = capsys.readouterr().out
    assert "first layer beyond budget: llm.layers[0].attention_norm, prefill" in said and message in said
    assert saved.exists()


def test_unaffordable_budget_is_reported_as_missing(attach: Any, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(shadow_recorder, "BUDGET_SECONDS", 0.0)
    attach("swiglu", OPS["swiglu"].reference)
    assert shadow.main(["--op", "swiglu", "--impl", "candidate", "--count", "1", "--tokens", "0"]) == 0
    said = capsys.readouterr().out
    assert "no budget for some calls of 4 layers, llm.layers[0] first: float64 takes too long" in said
    assert "beyond budget" not in said


def test_differences_are_counted_in_ulps() -> None:
    want = torch.tensor([1.0, 1.0, 0.0, -1.0, 1.0, float("nan")], dtype=torch.float16)
    got = want.clone()
    got[1] = torch.nextafter(want[1], torch.tensor(2.0).half())
    got[2] = -0.0
    got[3] = want[3] * (1 - 3 * 2**-11)
    got[4] = float("nan")
    counts = {name: n for name, n in shadow_recorder.ulp_histogram(got, want).items() if n}
    assert counts == {"0": 3, "1": 1, "2-3": 1, "NaN": 1}
    assert shadow_recorder.ulp_histogram(torch.tensor([1e-45]), torch.tensor([-1e-45]))["2-3"] == 1


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    picture = BUNDLED_CHECKPOINT.parent / "examples" / "a.png"
    file.write_text(json.dumps({"question": "What is red?", "images": [str(picture)]}) + "\n")
    (prompt,) = prompts.read_prompts(file)
    assert prompt.question == "What is red?" and len(prompt.images) == 1
    for text in ('{"question": 3}', '{"question": ' + "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ValueError, match=":1: expected"):
            prompts.read_prompts(file)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--op", "sorcery", "--impl", "x"], "no op 'sorcery'; there are: "),
        (["--op", "rope", "--impl", "x"], "op 'rope' has no implementation 'x'; there are: reference"),
        (["--op", "rope", "--impl", "triton", "--count", "99"], "99 bundled questions, expected 1 to "),
        (["--op", "rope", "--impl", "triton", "--model", "nowhere"], "nowhere"),
        (["--op", "rope", "--impl", "triton", "--prompts", __file__], ':1: expected {"question": '),
        (
            ["--op", "int4_matmul", "--impl", "reference", "--model", str(BUNDLED_CHECKPOINT), *ONE],
            "makes no call of int4_matmul",
        ),
    ],
)
def test_bad_usage_is_refused_in_one_line(argv: list[str], message: str, capsys) -> None:
    assert shadow.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.splitlines()[-1].startswith("bench.shadow: ") and "Traceback" not in said
