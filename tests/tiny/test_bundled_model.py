"""The bundled model and what it is made of: the held-out split, the tokenizer, and right answers the whole way."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.correctness.error_budget import DEVICE, UNSUPPORTED_DTYPES
from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.chat.prompts import insert_image_tokens, tokenize
from vila_triton.engine.engine import generate_tokens
from vila_triton.engine.sampling import SamplingParams
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.images.processing import ImageError, open_image
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import OPS, REFERENCE, count_calls, discover, use
from vila_triton.tiny import training_data as rows
from vila_triton.tiny.evaluate import build_questions, evaluate, greedy_answers
from vila_triton.tiny.questions import KINDS, random_question
from vila_triton.tiny.scenes import draw_scene, is_held_out, random_scene

INT4 = BUNDLED_CHECKPOINT.with_name("checkpoint-int4")


@pytest.fixture(scope="module")
def chat_model() -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def chat_model_int4() -> ChatModel:
    return load_chat_model(INT4, DEVICE)


def test_training_scenes_are_never_held_out():
    rng = random.Random(0)
    assert not any(is_held_out(random_scene(rng)) for _ in range(2000))
    assert all(is_held_out(random_scene(rng, "held_out")) for _ in range(200))


def test_vocabulary_has_every_word_of_questions_and_answers(chat_model):
    rng = random.Random(1)
    for n in (1, 2, 3):
        for _ in range(300):
            qa = random_question(rng, [random_scene(rng) for _ in range(n)])
            assert chat_model.tokenizer.unk_token_id not in chat_model.tokenizer(f"{qa.question} {qa.answer}").input_ids
            ids = chat_model.tokenizer(qa.answer).input_ids
            assert chat_model.tokenizer.decode(ids, skip_special_tokens=True) == qa.answer


def test_training_pixels_equal_those_of_the_image_processor(chat_model):
    rng = random.Random(2)
    images = [draw_scene(random_scene(rng), rng) for _ in range(4)]
    assert torch.equal(rows.preprocess(images), chat_model.preprocess_images(images))


def test_training_row_begins_as_a_prompt(chat_model):
    qa = random_question(random.Random(3), [random_scene(random.Random(3))])
    prompt = chat_model.prompt_ids(qa.question, 1)
    wide = [rows.IMAGE_FEATURE if t == -200 else t for t in prompt for _ in range(16 if t == -200 else 1)]
    prefix = rows.build_row(random.Random(0), [random_scene(random.Random(3))], False).ids[: 2 + 16 + 1]
    assert wide[: len(prefix)] == prefix


@pytest.mark.parametrize("folder", [BUNDLED_CHECKPOINT, INT4], ids=lambda f: f.name)
def test_answers_about_held_out_images_are_right(folder):
    right = evaluate(load_chat_model(folder), build_questions(6, seed=77))
    every = [value for values in right.values() for value in values]
    assert sum(every) / len(every) > 0.9


@pytest.mark.on_gpu
def test_triton_kernels_give_the_answers_of_the_references(chat_model_int4):
    discover()
    batch = [i for i in build_questions(2, seed=5) if "escribe" not in i.qa.question][::60]
    with use(**dict.fromkeys(OPS, REFERENCE)):
        expected = greedy_answers(chat_model_int4, batch)
    ours = {name: "triton" for name, op in OPS.items() if "triton" in op.impls} | {"int4_matmul": "packed"}
    with use(**ours), count_calls() as calls:
        assert greedy_answers(chat_model_int4, batch) == expected
    assert {(op, impl) for (op, impl) in calls if op in ours} <= ours.items()
    assert ("int4_matmul", "packed") in calls and ("prefill_attention", "triton") in calls


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("folder", [BUNDLED_CHECKPOINT, INT4], ids=lambda f: f.name)
def test_compiled_kernels_answer_right(folder, dtype):
    if dtype in UNSUPPORTED_DTYPES:
        pytest.skip(f"{dtype} is compiled, not interpreted")
    right = evaluate(load_chat_model(folder, DEVICE, getattr(torch, dtype)), build_questions(6, seed=77))
    every = [value for values in right.values() for value in values]
    assert sum(every) / len(every) > 0.9


def test_later_turns_prefill_only_new_tokens_and_answer_as_a_full_prefill(chat_model):
    rng = random.Random(4)
    first, second = (draw_scene(random_scene(rng, "held_out"), rng) for _ in range(2))
    conversation = Conversation(chat_model)
    questions = [("How many shapes are there?", [first]), ("Describe the picture.", []), ("And now?", [second])]
    for question, images in questions:
        cached = conversation.cache.length(conversation.seq)
        tokens = list(conversation.ask(question, images))
        assert conversation.last_turn is not None and conversation.last_turn.prefill_tokens < 30 + 16 * len(images)
        assert conversation.last_turn.prefill_tokens == conversation.last_turn.prompt_tokens - cached
        again = Conversation(chat_model)  # the same tokens, nothing cached
        prompt = conversation.spliced_ids[: len(conversation.spliced_ids) - len(tokens)]
        again.cache.ensure_capacity({again.seq: len(prompt) + 128})
        how = SamplingParams.from_generate_kwargs(1, eos_token_id=chat_model.tokenizer.eos_token_id)
        rows, features = {again.seq: prompt}, conversation.image_features
        full = generate_tokens(chat_model.model.params, rows, chat_model.model.vila_config, again.cache, features, how)
        assert [token for _, token in full] == tokens


def test_refused_or_abandoned_turn_leaves_the_conversation_unchanged(chat_model):
    conversation = Conversation(chat_model)
    list(conversation.ask("How many shapes are there?", [Image.new("RGB", (64, 64))]))
    row, cached = conversation.spliced_ids.tolist(), conversation.cache.length(conversation.seq)
    with pytest.raises(ValueError, match=r"context is 4096"):
        list(conversation.ask("Why?", max_new_tokens=5000))
    with pytest.raises(ValueError, match="places for 2 images, but 1"):
        list(conversation.ask("<image> or <image>?", [Image.new("RGB", (64, 64))]))
    given_up = conversation.ask("Describe the picture.")
    next(given_up)
    given_up.close()
    assert conversation.spliced_ids.tolist() == row and conversation.cache.length(conversation.seq) == cached


def test_prompts_hold_one_image_token_per_image_and_one_bos(chat_model):
    assert insert_image_tokens("Why?", 2) == "<image>\n<image>\nWhy?"
    bos, image = chat_model.tokenizer.bos_token_id, -200
    ids = tokenize("<image>\nHow many?", chat_model.tokenizer)
    assert ids[:2] == [bos, image] and ids.count(bos) == 1
    assert tokenize("How <image> many?", chat_model.tokenizer, add_bos=False).count(bos) == 0


def test_file_that_is_no_image_is_named(tmp_path: Path):
    with pytest.raises(ImageError, match=r"none\.png does not exist"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageError, match=r"text\.png cannot be read"):
        open_image(tmp_path / "text.png")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:900])
    with pytest.raises(ImageError, match=r"cut\.png cannot be read"):
        open_image(tmp_path / "cut.png")


def test_question_kinds_cover_all_groups():
    groups = {kind.group for kind in KINDS.values()}
    assert groups >= {"counting", "colour", "shape", "position", "yes/no", "description", "comparing images"}
