"""generation_config.json counts as in Hugging Face, in generate, in a conversation and on the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vila_triton import VilaLlamaForCausalLM
from vila_triton.__main__ import main
from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.chat.tokenizer import load_tokenizer
from vila_triton.models.params import LoadError
from vila_triton.paths import BUNDLED_CHECKPOINT

QUESTION = "Describe the picture."
TOKENIZER = load_tokenizer(BUNDLED_CHECKPOINT)
PLAIN = VilaLlamaForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, device="cpu", dtype=torch.float32)
IDS = torch.tensor([ChatModel(PLAIN, TOKENIZER, None).prompt_ids(QUESTION, 0)])
ANSWER = PLAIN.generate(IDS)[0].tolist()
LOOPS = ("engine", "transformers")


def folder(tmp_path: Path, config: dict[str, Any], root: dict[str, Any] | None = None) -> Path:
    """The bundled model with these generation_config.json files."""
    target = tmp_path / "model"
    shutil.copytree(BUNDLED_CHECKPOINT, target)
    (target / "llm" / "generation_config.json").write_text(json.dumps(config))
    if root is not None:
        (target / "generation_config.json").write_text(json.dumps(root))
    return target


def load(path: Path) -> VilaLlamaForCausalLM:
    return VilaLlamaForCausalLM.from_pretrained(path, device="cpu", dtype=torch.float32)


def answers(model: VilaLlamaForCausalLM, **arguments: Any) -> list[list[int]]:
    """Generate with both loops and in a conversation."""
    generated = [model.generate(IDS, loop=loop, **arguments)[0].tolist() for loop in LOOPS]
    return [*generated, list(Conversation(ChatModel(model, TOKENIZER, None)).ask(QUESTION, **arguments))]


LENGTH = IDS.shape[1]
WORD = ANSWER[1]


@pytest.mark.parametrize(
    "config, root, expected",
    [
        ({"eos_token_id": WORD}, None, ANSWER[:2]),
        ({"eos_token_id": [ANSWER[-1], WORD], "pad_token_id": -1}, None, ANSWER[:2]),
        ({"max_new_tokens": 1}, None, ANSWER[:1]),
        ({"max_length": LENGTH + 2}, None, ANSWER[:2]),
        ({"max_length": 5, "max_new_tokens": 3}, None, ANSWER[:3]),
        ({"temperature": 0.9, "top_p": 0.6, "max_new_tokens": 4, "top_k": None}, None, ANSWER[:4]),  # nothing is drawn
        ({"max_new_tokens": 4}, {"max_new_tokens": 2}, ANSWER[:2]),
    ],
    ids=str,
)
def test_generation_config_decides_length_and_stop_tokens(
    config: dict, root: dict | None, expected: list, tmp_path: Path
) -> None:
    assert len(ANSWER) > 4 and ANSWER.index(WORD) == 1
    model = load(folder(tmp_path, config, root))
    assert answers(model) == [expected] * 3
    assert answers(model, max_new_tokens=2) == [ANSWER[:2]] * 3  # whoever asks decides
    model.save_pretrained(tmp_path / "saved")
    assert answers(load(tmp_path / "saved"))[0] == expected


def test_generation_config_decides_sampling(tmp_path: Path) -> None:
    config = {"do_sample": True, "temperature": 3.0, "top_k": 7, "top_p": 0.95, "repetition_penalty": 1.5}
    model = load(folder(tmp_path, config))
    ours = model.generate(IDS, seed=3, max_new_tokens=9)
    spoken = list(Conversation(ChatModel(model, TOKENIZER, None)).ask(QUESTION, seed=3, max_new_tokens=9))
    expected = PLAIN.generate(IDS, seed=3, max_new_tokens=9, **config)
    assert torch.equal(ours, expected) and [spoken] == expected.tolist() and ANSWER[:9] != spoken
    greedy = PLAIN.generate(IDS, repetition_penalty=1.5, max_new_tokens=5)
    for loop in LOOPS:
        assert torch.equal(model.generate(IDS, do_sample=False, loop=loop, max_new_tokens=5), greedy)


def test_ignored_settings_are_warned_about_once(tmp_path: Path) -> None:
    config = {"num_beams": 4, "use_cache": True, "length_penalty": 1.0, "cache_implementation": "static"}
    with pytest.warns() as heard:
        model = load(folder(tmp_path, config))
    beams, cache = sorted(str(warning.message) for warning in heard)[::-1]
    assert beams.endswith("num_beams=4 counts in generate(loop='transformers') only")
    assert "cache_implementation='static' does not count: the cache is paged" in cache
    of_beams = PLAIN.generate(IDS, loop="transformers", num_beams=4, max_new_tokens=3)
    assert torch.equal(model.generate(IDS, loop="transformers", max_new_tokens=3), of_beams)
    assert model.generate(IDS, max_new_tokens=3)[0].tolist() == ANSWER[:3]


WRONG: dict[str, tuple[Any, str]] = {
    "eos": ({"eos_token_id": 128}, "eos_token_id is 128, expected the id of a token below 128, or several"),
    "eos of a kind": ({"eos_token_id": [2, "3"]}, "eos_token_id is .*expected the id of a token"),
    "huge": ({"eos_token_id": 10**30}, "eos_token_id is 1000"),
    "nan": ({"temperature": float("nan")}, "is not JSON: NaN is not a finite number"),
    "negative": ({"repetition_penalty": -1}, "repetition_penalty is -1, expected a number of at least 1e-06"),
    "top_p": ({"top_p": 1.5}, "top_p is 1.5, expected a number above 0 and at most 1$"),
    "length": ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1 and at most"),
    "hot": ({"temperature": 2**31}, "temperature is 2147483648, expected a number of at least 0 and at most 1000000"),
    "many": ({"top_k": 10**8}, "top_k is 100000000, expected a whole number of at least 0 and at most 1000000"),
    "flag": ({"do_sample": "yes"}, "do_sample is yes, expected true or false"),
    "cold": ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0 and do_sample true, which contradict"),
    "list": ([1], "holds a list, expected an object"),
}


@pytest.mark.parametrize("config, message", WRONG.values(), ids=WRONG)
def test_invalid_values_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=rf"generation_config\.json:? .*{message}"):
        load(folder(tmp_path, config))


def test_prompt_longer_than_max_length_is_refused(tmp_path: Path) -> None:
    model = load(folder(tmp_path, {"max_length": LENGTH}))
    for loop in LOOPS:
        with pytest.raises(ValueError, match=f"the prompt has {LENGTH} positions, but max_length is {LENGTH} "):
            model.generate(IDS, loop=loop)


def test_command_line_prints_effective_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = folder(tmp_path, {"do_sample": True, "temperature": 0.5, "max_new_tokens": 2})
    for more, expected in (
        ((), "max_new_tokens 2, temperature 0.5 by"),
        (("--temperature", "0"), "max_new_tokens 2 by"),
    ):
        monkeypatch.setattr("sys.argv", ["vila-triton", "ask", "--model", str(model), *more, QUESTION])
        assert main() == 0
        assert f"| {expected} generation_config.json | " in capsys.readouterr().err
