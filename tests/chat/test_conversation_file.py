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
    OLD_FORMAT,
    OLD_TENSORS,
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


def fresh(chat_model: ChatModel) -> ChatModel:
    """The same model with nothing in its cache."""
    return ChatModel(chat_model.model, chat_model.tokenizer, chat_model.processor)


def held(chat_model: ChatModel, rounds: list) -> tuple[Conversation, list[list[int]]]:
    conversation = Conversation(chat_model)
    return conversation, [list(conversation.ask(question, images)) for question, images in rounds]


@pytest.fixture(scope="module")
def whole(tiny: ChatModel) -> tuple[Conversation, list[list[int]]]:
    return held(fresh(tiny), ROUNDS)


def test_turns_have_the_ids_and_answers_of_the_whole_text(tiny: ChatModel, whole: Any) -> None:
    conversation, answers = whole
    how, text = TEMPLATES["vicuna_v1_nosys"], ""
    for (question, images), answer in zip(ROUNDS, answers):
        asked = "<image>\n" * len(images) + question
        text += how.render_turn(asked) if text else how.render_first_turn(asked)
        ids = torch.tensor([tokenize(text, tiny.tokenizer)])
        pixels = tiny.preprocess_images([FIRST, SECOND][: text.count("<image>")])
        assert tiny.model.generate(ids, pixels, max_new_tokens=128).tolist() == [answer]  # nothing cached
        text += f" {tiny.tokenizer.decode(answer, skip_special_tokens=True)}</s>"
    words = [i for i in tokenize(text, tiny.tokenizer) if i != -200]
    assert (
        conversation.spliced_ids[conversation.spliced_ids >= 0].tolist() == words
        and words.count(tiny.stop_token_ids[0]) == 3
    )


def test_truncated_answer_is_followed_by_the_end_of_turn(tiny: ChatModel) -> None:
    conversation = Conversation(fresh(tiny))
    cut = list(conversation.ask(*ROUNDS[0], max_new_tokens=1))
    assert conversation.spliced_ids[-2:].tolist() == [*cut, tiny.stop_token_ids[0]]


def test_saved_conversation_continues_as_an_unsaved_one(tiny: ChatModel, whole: Any, tmp_path: Path) -> None:
    conversation, _ = held(fresh(tiny), ROUNDS[:2])
    save_conversation(Conversation(fresh(tiny)), tmp_path / "talk")
    save_conversation(conversation, tmp_path / "talk")  # over the one before, which was empty
    again = load_conversation(fresh(tiny), tmp_path / "talk")
    assert list(again.ask(*ROUNDS[2])) == whole[1][2] and again.spliced_ids.tolist() == whole[0].spliced_ids.tolist()
    assert again.last_turn and again.last_turn.prefill_tokens == again.last_turn.prompt_tokens
    assert [path.name for path in tmp_path.iterdir()] == ["talk"]


def other_model(chat_model: ChatModel) -> ChatModel:
    changed = load_chat_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    changed.model.params.llm.layers[3].down.weight.mul_(1.001)
    return changed


def other_tokenizer(chat_model: ChatModel) -> ChatModel:
    changed = load_chat_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    changed.tokenizer.add_tokens(["zebra"])
    return changed


def other_template(chat_model: ChatModel) -> ChatModel:
    changed = fresh(chat_model)
    changed.__dict__["template"] = replace(chat_model.template, system="Be kind.")
    return changed


@pytest.mark.parametrize("other", [other_model, other_tokenizer, other_template])
@torch.no_grad()
def test_loading_with_another_model_tokenizer_or_template_is_refused(
    tiny: ChatModel, whole: Any, tmp_path: Path, other: Any
) -> None:
    save_conversation(whole[0], tmp_path / "talk")
    what = other.__name__.removeprefix("other_")
    with pytest.raises(
        ConversationFileError, match=rf"talk is a conversation with another {what}; resume it with the one it"
    ):
        load_conversation(other(tiny), tmp_path / "talk")


def test_other_files_are_neither_loaded_nor_replaced(tiny: ChatModel, whole: Any, tmp_path: Path) -> None:
    save_conversation(whole[0], tmp_path / "talk")
    content = (tmp_path / "talk").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-100])
    (tmp_path / "text").write_text("not one")
    save_file({"spliced_ids": torch.zeros(3)}, tmp_path / "weights")
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


def test_inconsistent_file_is_reported_as_damaged(tiny: ChatModel, whole: Any, tmp_path: Path) -> None:
    about = {"format": FILE_FORMAT, **fingerprints(tiny)}
    wide = torch.zeros(16, tiny.model.vila_config.llm.hidden_size)
    for tensors, message in (
        ({"spliced_ids": torch.tensor([1, -17]), "image_features": wide}, "do not belong together"),
        ({"spliced_ids": torch.tensor([1, 5]), "image_features": wide[:, 1:].clone()}, "do not belong together"),
        ({"spliced_ids": torch.tensor([1, 128])}, "do not belong together"),
        ({"image_features": wide}, "lacks its tokens"),
    ):
        save_file(tensors, tmp_path / "talk", about)
        with pytest.raises(ConversationFileError, match=f"damaged conversation: .*{message}"):
            load_conversation(tiny, tmp_path / "talk")


def test_features_of_a_file_never_stand_in_for_an_image(tiny: ChatModel, tmp_path: Path) -> None:
    save_conversation(held(fresh(tiny), ROUNDS[:1])[0], tmp_path / "talk")
    tensors, about = read_conversation_file(tmp_path / "talk")
    save_file(tensors | {"image_features": tensors["image_features"].flip(0).contiguous()}, tmp_path / "talk", about)
    chat_model = fresh(tiny)
    list(load_conversation(chat_model, tmp_path / "talk").ask("Describe the picture.", max_new_tokens=2))
    conversation, _ = held(chat_model, ROUNDS[:1])
    assert conversation.last_turn and conversation.last_turn.prefill_tokens >= len(tensors["image_features"])


OLD_FINGERPRINTS = {  # of the bundled model in float32, as the release before wrote them
    "model": "c12e981a9d5f157367b44389a82cdc34",
    "template": "0c6bb6e315a366661301921259bb9871",
}


def test_file_of_the_format_before_is_loaded_with_a_note(
    tiny: ChatModel, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    conversation, _ = held(fresh(tiny), ROUNDS[:2])
    save_conversation(conversation, tmp_path / "talk")
    tensors, _ = read_conversation_file(tmp_path / "talk")
    metadata = {"format": OLD_FORMAT, **fingerprints(tiny, OLD_FORMAT)}
    assert metadata.items() >= OLD_FINGERPRINTS.items()
    save_file({old: tensors[new] for old, new in OLD_TENSORS.items()}, tmp_path / "talk", metadata)
    again = load_conversation(fresh(tiny), tmp_path / "talk")
    assert list(again.ask(*ROUNDS[2])) == whole[1][2]
    assert capsys.readouterr().err.startswith(f"note: {tmp_path / 'talk'} has the format of an older release")
