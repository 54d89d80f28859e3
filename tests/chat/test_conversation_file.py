"""Conversations of several rounds: the ids they are made of, and going on with them after they were saved."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.chat.conversation_file import (
    FILE_FORMAT,
    ConversationFileError,
    fingerprints,
    load_conversation,
    read_conversation_file,
    save_conversation,
)
from vila_triton.chat.prompts import tokenize
from vila_triton.chat.templates import TEMPLATES
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.scenes import draw_scene, random_scene

RNG = random.Random(4)
FIRST, SECOND = (draw_scene(random_scene(RNG, "held_out"), RNG) for _ in range(2))
ROUNDS = [
    ("How many shapes are there?", [FIRST]),
    ("Describe the picture.", []),
    ("Describe the second image.", [SECOND]),
]


@pytest.fixture(scope="module")
def tiny() -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)


def fresh(talker: ChatModel) -> ChatModel:
    """The same model with nothing in its cache."""
    return ChatModel(talker.model, talker.tokenizer, talker.processor)


def held(talker: ChatModel, rounds: list) -> tuple[Conversation, list[list[int]]]:
    conversation = Conversation(talker)
    return conversation, [list(conversation.ask(question, pictures)) for question, pictures in rounds]


@pytest.fixture(scope="module")
def whole(tiny: ChatModel) -> tuple[Conversation, list[list[int]]]:
    return held(fresh(tiny), ROUNDS)


def test_rounds_are_made_of_the_ids_of_the_whole_text_and_answered_as_those_are(tiny: ChatModel, whole: Any) -> None:
    conversation, answers = whole
    how, text = TEMPLATES["vicuna_v1_nosys"], ""
    for (question, pictures), answer in zip(ROUNDS, answers):
        asked = "<image>\n" * len(pictures) + question
        text += how.render_turn(asked) if text else how.render_first_turn(asked)
        ids = torch.tensor([tokenize(text, tiny.tokenizer)])
        pixels = tiny.preprocess_images([FIRST, SECOND][: text.count("<image>")])
        assert tiny.model.generate(ids, pixels, max_new_tokens=128).tolist() == [answer]  # nothing cached
        text += f" {tiny.tokenizer.decode(answer, skip_special_tokens=True)}</s>"
    words = [i for i in tokenize(text, tiny.tokenizer) if i != -200]
    assert conversation.row[conversation.row >= 0].tolist() == words and words.count(tiny.stop_token_ids[0]) == 3


def test_an_answer_that_was_cut_off_is_ended_all_the_same(tiny: ChatModel) -> None:
    conversation = Conversation(fresh(tiny))
    cut = list(conversation.ask(*ROUNDS[0], max_new_tokens=1))
    assert conversation.spliced_ids[-2:].tolist() == [*cut, tiny.stop_token_ids[0]]


def test_a_saved_conversation_goes_on_as_if_it_had_not_been(tiny: ChatModel, whole: Any, tmp_path: Path) -> None:
    conversation, _ = held(fresh(tiny), ROUNDS[:2])
    save_conversation(Conversation(fresh(tiny)), tmp_path / "talk")
    save_conversation(conversation, tmp_path / "talk")  # over the one before, which was empty
    again = load_conversation(fresh(tiny), tmp_path / "talk")
    assert list(again.ask(*ROUNDS[2])) == whole[1][2] and again.spliced_ids.tolist() == whole[0].row.tolist()
    assert again.last_turn and again.last_turn.prefill_tokens == again.last_turn.prompt_tokens
    assert [path.name for path in tmp_path.iterdir()] == ["talk"]


def other_model(talker: ChatModel) -> ChatModel:
    changed = load_chat_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    changed.model.params.llm.layers[3].down.weight.mul_(1.001)
    return changed


def other_tokenizer(talker: ChatModel) -> ChatModel:
    changed = load_chat_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    changed.tokenizer.add_tokens(["zebra"])
    return changed


def other_template(talker: ChatModel) -> ChatModel:
    changed = fresh(talker)
    changed.__dict__["template"] = replace(talker.template, system="Be kind.")
    return changed


@pytest.mark.parametrize("other", [other_model, other_tokenizer, other_template])
@torch.no_grad()
def test_it_goes_on_only_with_what_it_was_held_with(tiny: ChatModel, whole: Any, tmp_path: Path, other: Any) -> None:
    save_conversation(whole[0], tmp_path / "talk")
    what = other.__name__.removeprefix("other_")
    with pytest.raises(
        ConversationFileError, match=rf"talk is a conversation with another {what}; resume it with the one it"
    ):
        load_conversation(other(tiny), tmp_path / "talk")


def test_what_is_no_conversation_is_neither_resumed_nor_replaced(tiny: ChatModel, whole: Any, tmp_path: Path) -> None:
    save_conversation(whole[0], tmp_path / "talk")
    content = (tmp_path / "talk").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-100])
    (tmp_path / "text").write_text("not one")
    save_file({"row": torch.zeros(3)}, tmp_path / "weights")
    for name in ("cut", "text", "weights"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ConversationFileError, match=rf"{name} is not a saved conversation; /save writes them"):
            load_conversation(tiny, tmp_path / name)
        with pytest.raises(
            ConversationFileError, match=rf"{name} exists and is not a saved conversation; choose another name"
        ):
            save_conversation(whole[0], tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(ConversationFileError, match="none does not exist"):
        load_conversation(tiny, tmp_path / "none")
    with pytest.raises(ConversationFileError, match="talk cannot be written"):
        save_conversation(whole[0], tmp_path / "nowhere" / "talk")


def test_a_conversation_that_does_not_hold_together_is_damaged(tiny: ChatModel, whole: Any, tmp_path: Path) -> None:
    about = {"format": FILE_FORMAT, **fingerprints(tiny)}
    wide = torch.zeros(16, tiny.model.vila_config.llm.hidden_size)
    for tensors, message in (
        ({"row": torch.tensor([1, -17]), "features": wide}, "do not belong together"),
        ({"row": torch.tensor([1, 5]), "features": wide[:, 1:].clone()}, "do not belong together"),
        ({"row": torch.tensor([1, 128])}, "do not belong together"),
        ({"features": wide}, "lacks its tokens"),
    ):
        save_file(tensors, tmp_path / "talk", about)
        with pytest.raises(ConversationFileError, match=f"damaged conversation: .*{message}"):
            load_conversation(tiny, tmp_path / "talk")


def test_features_in_a_file_answer_for_no_picture(tiny: ChatModel, tmp_path: Path) -> None:
    save_conversation(held(fresh(tiny), ROUNDS[:1])[0], tmp_path / "talk")
    tensors, about = read_conversation_file(tmp_path / "talk")
    save_file(tensors | {"features": tensors["features"].flip(0).contiguous()}, tmp_path / "talk", about)
    talker = fresh(tiny)
    list(load_conversation(talker, tmp_path / "talk").ask("Describe the picture.", max_new_tokens=2))
    conversation, _ = held(talker, ROUNDS[:1])
    assert conversation.last_turn and conversation.last_turn.prefill_tokens >= len(tensors["features"])
