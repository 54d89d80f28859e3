"""Texts that end answers."""

import random
from pathlib import Path
from typing import Any

import pytest
import small_sentencepiece
import torch
from small_tokenizers import HEADERS, of_bytes
from transformers.generation.stopping_criteria import StopStringCriteria

from vila_triton import VilaLlamaForCausalLM
from vila_triton.chat.prompts import first_turn_ids
from vila_triton.chat.templates import TEMPLATES
from vila_triton.chat.tokenizer import load_tokenizer
from vila_triton.engine.stopping import StopStrings
from vila_triton.paths import BUNDLED_CHECKPOINT


@pytest.mark.parametrize("loop", ["engine", "transformers"])
def test_stop_strings_end_answers_with_any_tokenizer(loop: str, tmp_path: Path) -> None:
    small_sentencepiece.place(tmp_path, "small")
    model = VilaLlamaForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, device="cpu", dtype=torch.float32)
    for tokenizer in (load_tokenizer(BUNDLED_CHECKPOINT), load_tokenizer(tmp_path)):
        ids = torch.tensor([first_turn_ids("Describe the picture.", TEMPLATES["vicuna_v1_nosys"], tokenizer)])
        whole = model.generate(ids, max_new_tokens=12, eos_token_id=None)[0].tolist()
        for end in (2, 5, 9):
            text = tokenizer.decode(whole[:end])[-3:]
            expected = next(n for n in range(1, 13) if text in tokenizer.decode(whole[:n]))
            answer = model.generate(
                ids, max_new_tokens=12, eos_token_id=None, stop_strings=[text, "never"], tokenizer=tokenizer, loop=loop
            )
            assert answer[0].tolist() == whole[:expected] and expected <= end


def test_stop_strings_end_where_transformers_criterion_does() -> None:
    tokenizer, rng = of_bytes(HEADERS), random.Random(3)
    unused: Any = torch.zeros(1)
    for texts in ("ta", ["it", " is"], ["?"]):
        ours, theirs = StopStrings(tokenizer, texts), StopStringCriteria(tokenizer, texts)
        for _ in range(60):
            row: Any = torch.tensor([[rng.randrange(5, len(tokenizer)) for _ in range(rng.randint(2, 9))]])
            assert ours(row).tolist() == theirs(row, unused).tolist(), tokenizer.decode(row[0])
    with pytest.raises(ValueError, match="expected a text or several, none of them empty"):
        StopStrings(tokenizer, [""])
    with pytest.raises(ValueError, match="stop_strings need tokenizer="):
        StopStrings(None, "a")


@pytest.mark.parametrize("texts", [["a", ""], ["a", 3], [], [b"a"]], ids=str)
def test_one_wrong_stop_string_among_several_is_refused(texts: Any) -> None:
    with pytest.raises(ValueError, match="expected a text or several, none of them empty"):
        StopStrings(of_bytes(HEADERS), texts)


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    "text, stops", [("xab", True), ("xabx", False), ("abx", False), ("cc", True), ("cx", False), ("abab", True)]
)
def test_only_a_stop_string_that_the_last_token_completes_stops(text: str, stops: bool) -> None:
    assert StopStrings(Letters(), ["ab", "c"]).completes_stop_string([*map(ord, text)]) == stops


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    "stop", ["\N{GRINNING FACE}", "\N{GRINNING FACE}\N{WAVING HAND SIGN}", "\N{GRINNING FACE}" * 5]
)
def test_stop_string_of_characters_of_four_tokens_each_stops(stop: str) -> None:
    row = [*f"a long text, {stop}".encode()]
    assert StopStrings(Bytes(), [stop, "x"]).completes_stop_string(row)
    assert not StopStrings(Bytes(), [stop, "x"]).completes_stop_string(row[:-1])
