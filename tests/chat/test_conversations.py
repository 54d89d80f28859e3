"""Conversations on the bundled model: many at once, and what those that begin alike share."""

import copy
import gc
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vila_triton.__main__ import main
from vila_triton.cache.page_allocator import OutOfPages
from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.models import llama, vila
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import count_calls
from vila_triton.tiny.evaluate import question_of_kind
from vila_triton.tiny.scenes import draw_scene, random_scene

RNG = random.Random(8)
KINDS = [
    ("description", 3),
    ("count shape", 1),
    ("at", 2),
    ("exists", 1),
    ("more", 2),
    ("description", 1),
    ("colour", 3),
]
ASKED = [(found.qa.question, found.images) for found in (question_of_kind(RNG, kind, n) for kind, n in KINDS)]
ASKED.insert(2, ("How many shapes are there?", []))  # of no image at all
IMAGES = [draw_scene(random_scene(RNG, "held_out"), RNG) for _ in range(3)]
QUESTIONS = ["How many shapes are there?", "Describe the picture.", "What colour is the shape at the top?"]


@pytest.fixture
def chat_model(tiny: ChatModel, monkeypatch: pytest.MonkeyPatch) -> ChatModel:
    """The bundled model with nothing cached; changes to its config are forgotten after the test."""
    for name in ("page_size", "kv_dtype", "attention_numerics", "prefill_chunk_size"):
        monkeypatch.setattr(tiny.model.config, name, getattr(tiny.model.config, name))
    return ChatModel(tiny.model, tiny.tokenizer, tiny.processor)


@pytest.fixture(scope="module")
def tiny() -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of images of each call of the vision tower."""
    counts: list[int] = []
    whole = vila.encode_images

    def counted(p: Any, pixels: Tensor, *args: Any) -> Tensor:
        counts.append(len(pixels))
        return whole(p, pixels, *args)

    monkeypatch.setattr(vila, "encode_images", counted)
    yield counts


def test_sampled_answers_differ_and_repeat_with_their_seed(chat_model: ChatModel) -> None:
    question, how = ASKED[0], {"do_sample": True, "temperature": 5.0, "max_new_tokens": 12}
    drawn = []
    for seed in (None, None, 0):
        conversation = Conversation(chat_model)
        tokens = list(conversation.ask(*question, seed=seed, **how))
        assert conversation.last_turn and conversation.last_turn.seed is not None
        assert list(Conversation(chat_model).ask(*question, seed=conversation.last_turn.seed, **how)) == tokens
        drawn.append((tokens, conversation.last_turn.seed))
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1] and drawn[2][1] == 0
    conversation = Conversation(chat_model)
    list(conversation.ask(*question))
    assert conversation.last_turn and conversation.last_turn.seed is None


def test_invalid_sampling_argument_is_refused_before_images_are_encoded(chat_model: ChatModel, seen: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^top_p is nan"):
        list(Conversation(chat_model).ask("Why?", IMAGES[:1], do_sample=True, top_p=float("nan")))
    assert not seen


def generate(chat_model: ChatModel, asked: list, **how: Any) -> list[list[int]]:
    """The answers to all in one batch, without what pads them."""
    prompts = [torch.tensor(chat_model.prompt_ids(question, len(images))) for question, images in asked]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
    images = [image for _, some in asked for image in some]
    pixels = chat_model.preprocess_images(images) if images else None
    stop = chat_model.tokenizer.eos_token_id
    answers = chat_model.model.generate(ids, pixels, mask, max_new_tokens=64, **how).tolist()
    return [answer[: answer.index(stop) + 1] for answer in answers]


@pytest.mark.parametrize(
    "config",
    [{}, {"prefill_chunk_size": 16}, {"page_size": 64, "kv_dtype": "int8"}, {"page_size": 256, "kv_dtype": "int4"}],
    ids=str,
)
def test_ragged_batch_of_eight_conversations_answers_as_each_alone(chat_model: ChatModel, config: dict) -> None:
    for name, value in config.items():
        setattr(chat_model.model.config, name, value)
    how = {"chunk_prefilling": "prefill_chunk_size" in config}
    together = generate(chat_model, ASKED, **how)
    assert sorted(len(images) for _, images in ASKED) == [0, 1, 1, 1, 2, 2, 3, 3]
    assert len({len(answer) for answer in together}) > 3  # they end at different times
    assert together == [answer for one in ASKED for answer in generate(chat_model, [one], **how)]


def ask(chat_model: ChatModel, image: int, question: str) -> tuple[Conversation, list[int]]:
    conversation = Conversation(chat_model)
    return conversation, list(conversation.ask(question, [IMAGES[image]]))


@pytest.mark.parametrize("page_size", [16, 256])
def test_second_question_about_an_image_prefills_its_own_tokens_and_encodes_nothing(
    chat_model: ChatModel, page_size: int, seen: list
) -> None:
    chat_model.model.config.page_size = page_size
    first, _ = ask(chat_model, 0, QUESTIONS[0])
    assert first.last_turn and first.last_turn.prefill_tokens == first.last_turn.prompt_tokens and seen == [1]
    with count_calls() as calls:
        second, answer = ask(chat_model, 0, QUESTIONS[1])
    prompts = [chat_model.prompt_ids(question, 1) for question in QUESTIONS[:2]]
    alike = next(i for i, (a, b) in enumerate(zip(*prompts)) if a != b)
    assert second.last_turn and second.last_turn.prefill_tokens == len(prompts[1]) - alike
    assert seen == [1] and not any(op == "encoder_attention" for op, _ in calls)
    other, _ = ask(chat_model, 1, QUESTIONS[1])
    before_the_image = prompts[1].index(-200)
    assert (
        other.last_turn
        and other.last_turn.prompt_tokens - other.last_turn.prefill_tokens == before_the_image
        and seen == [1, 1]
    )
    assert answer == generate(chat_model, [(QUESTIONS[1], IMAGES[:1])])[0]


def test_conversations_in_any_order_answer_as_each_alone(chat_model: ChatModel) -> None:
    expected = {(i, q): generate(chat_model, [(q, IMAGES[i : i + 1])])[0] for i in range(3) for q in QUESTIONS}
    assert len({tuple(answer) for answer in expected.values()}) > 4
    rng, kept = random.Random(1), []
    for _ in range(15):
        asked = rng.choice(list(expected))
        conversation, answer = ask(chat_model, *asked)
        assert answer == expected[asked]
        kept = [*kept, conversation][-3:]  # the others are let go, and with them their sequences
    assert len(chat_model.cache.allocator.sequences) == 3
    kept.clear()
    del conversation
    assert not chat_model.cache.allocator.sequences and not chat_model.cache.allocator.ref_counts


def test_prefill_of_an_abandoned_question_is_reused(chat_model: ChatModel) -> None:
    conversation = Conversation(chat_model)
    given_up = conversation.ask(QUESTIONS[0], [IMAGES[0]])
    next(given_up)
    given_up.close()
    assert conversation.cache.length(conversation.seq) == 0
    list(conversation.ask(QUESTIONS[0], [IMAGES[0]]))
    assert conversation.last_turn and conversation.last_turn.prefill_tokens == 1


def test_unfinished_answer_blocks_its_conversation_and_no_other(chat_model: ChatModel) -> None:
    _, expected = ask(ChatModel(chat_model.model, chat_model.tokenizer, chat_model.processor), 1, QUESTIONS[0])
    conversation = Conversation(chat_model)
    unread = conversation.ask(QUESTIONS[0], [IMAGES[0]])
    next(unread)
    for question in QUESTIONS[:2]:
        with pytest.raises(ValueError, match="the question before is not read to its end"):
            list(conversation.ask(question, [IMAGES[1]]))
    assert ask(chat_model, 1, QUESTIONS[0])[1] == expected
    list(unread)
    assert conversation.last_turn and list(conversation.ask(QUESTIONS[1]))


def test_tokenizer_is_called_by_one_thread_at_a_time(chat_model: ChatModel) -> None:
    """Those in Rust say "Already borrowed" to the second where the first has to change how they pad or truncate."""
    inside = threading.Lock()

    class Borrowed:
        def __getattr__(self, name: str) -> Any:
            return getattr(chat_model.tokenizer, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert inside.acquire(blocking=False), "Already borrowed"
            time.sleep(0.01)
            inside.release()
            return chat_model.tokenizer(*args, **kwargs)

    shared = ChatModel(chat_model.model, Borrowed(), chat_model.processor)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: list(Conversation(shared).ask(QUESTIONS[0])), range(4))
        assert list(answers) == [list(Conversation(chat_model).ask(QUESTIONS[0]))] * 4


@pytest.mark.parametrize("n", [2, 8])
def test_interleaved_conversations_answer_as_each_alone(chat_model: ChatModel, n: int) -> None:
    asked = [(i, QUESTIONS[i % 3]) for i in range(n)]
    expected = [generate(chat_model, [(question, IMAGES[i % 3 : i % 3 + 1])])[0] for i, question in asked]
    unread = {i: Conversation(chat_model).ask(question, [IMAGES[i % 3]]) for i, question in asked}
    answers: list[list[int]] = [[] for _ in asked]
    while unread:
        for i, answer in list(unread.items()):
            if (token := next(answer, None)) is None:
                del unread[i]
            else:
                answers[i].append(token)
    assert answers == expected and not chat_model.cache.allocator.reserved_lens


def test_max_pages_refuses_an_answer_that_could_not_finish(chat_model: ChatModel) -> None:
    few = ChatModel(chat_model.model, chat_model.tokenizer, chat_model.processor, max_pages=20)
    first, second = Conversation(few), Conversation(few)
    unread = first.ask(QUESTIONS[1], [IMAGES[0]], 150)
    next(unread)
    table = few.cache.allocator
    before = (
        copy.deepcopy(table.sequences),
        dict(table.evictable),
        dict(table.reserved_lens),
        list(table.free_pages),
        table.num_pages,
    )
    with pytest.raises(OutOfPages, match=r"^2\d pages of 16 tokens are needed .* but the limit is 20 \(2 sequences"):
        list(second.ask(QUESTIONS[0], [IMAGES[1]], 150))
    assert before == (table.sequences, table.evictable, table.reserved_lens, table.free_pages, table.num_pages)
    list(unread)
    assert list(second.ask(QUESTIONS[0], [IMAGES[1]], 150)) == generate(chat_model, [(QUESTIONS[0], IMAGES[1:2])])[0]
    assert table.num_pages <= 20


def test_question_about_another_image_evicts_nothing_while_pages_are_free(chat_model: ChatModel) -> None:
    chat_model.cache.add_pages(40)
    for image in (0, 1, 2):
        conversation, _ = ask(chat_model, image, QUESTIONS[0])
        del conversation
    for image in (0, 1, 2):
        conversation, _ = ask(chat_model, image, QUESTIONS[0])
        assert conversation.last_turn and conversation.last_turn.prefill_tokens == 1


def test_undone_turns_stay_cached_and_forks_are_independent(chat_model: ChatModel) -> None:
    conversation, first = ask(chat_model, 0, QUESTIONS[0])
    chat_model.cache.add_pages(20)
    described = list(conversation.ask(QUESTIONS[1]))
    conversation.undo()
    assert list(conversation.ask(QUESTIONS[2])) != described
    conversation.undo()
    fork = conversation.fork()
    assert list(fork.ask(QUESTIONS[1])) == described
    assert fork.last_turn and fork.last_turn.prefill_tokens == 1
    conversation.undo()
    assert not len(conversation.spliced_ids) and conversation.image_features is None
    assert list(conversation.ask(QUESTIONS[0], [IMAGES[0]])) == first
    for n in (0, 2, -1):
        with pytest.raises(ValueError, match=f"^{n} turns cannot be undone; there are 1$"):
            conversation.undo(n)
    unread = conversation.ask(QUESTIONS[1])
    next(unread)
    for what in (conversation.fork, conversation.undo):
        with pytest.raises(ValueError, match="not read to its end"):
            what()


def test_answer_garbage_collected_within_a_step_does_not_deadlock(
    chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(chat_model, 0, QUESTIONS[0])[1]
    circle: list[Any] = [Conversation(chat_model)]
    circle += [circle, circle[0].ask(QUESTIONS[1], [IMAGES[1]])]
    next(circle[2])
    whole = llama.forward

    def collecting(*args: Any) -> Tensor:
        gc.collect()
        return whole(*args)

    monkeypatch.setattr(llama, "forward", collecting)
    gc.disable()
    try:
        del circle
        assert ask(chat_model, 0, QUESTIONS[0])[1] == expected
    finally:
        gc.enable()
    assert not chat_model.cache.allocator.sequences and not chat_model.cache.allocator.reserved_lens


def test_command_line_keeps_the_cache_settings_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    own = {"attention_numerics": "batch_invariant", "kv_dtype": "int4", "page_size": 256}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    made = list[dict[str, Any]]()
    monkeypatch.setattr(
        ChatModel, "cache", property(lambda self: made.append(self.model.config.cache_kwargs()) or 1 / 0)
    )
    for more in ((), ("--kv-dtype", "int8")):
        argv = ["vila-triton", "ask", "--model", str(tmp_path / "model"), *more, "Why?"]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(ZeroDivisionError):
            main()
    assert made[0] == {"numerics": "batch_invariant", "kv_dtype": "int4", "page_size": 256}
    assert made[1] == made[0] | {"kv_dtype": "int8"}


def test_closed_conversation_frees_its_pages_and_refuses_questions(chat_model: ChatModel) -> None:
    conversation, _ = ask(chat_model, 0, QUESTIONS[0])
    conversation.close()
    conversation.close()
    assert not chat_model.cache.allocator.ref_counts
    for use in (lambda: list(conversation.ask(QUESTIONS[1])), conversation.undo, conversation.fork):
        with pytest.raises(ValueError, match="the conversation is closed; begin a new one"):
            use()
    answered = Conversation(chat_model)
    answer = answered.ask(QUESTIONS[0])
    next(answer)
    answered.close()
    with pytest.raises(ValueError, match="the conversation is closed; begin a new one"):
        next(answer)
    assert not chat_model.cache.allocator.sequences and not chat_model.cache.allocator.reserved_lens


def test_new_conversation_in_a_chat_shares_cached_prefixes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    image = f"/image {BUNDLED_CHECKPOINT.parent / 'examples' / 'a.png'}"
    typed = iter([image, "How many blue shapes are there?", "/new", image, "How many yellow shapes are there?"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed, "/quit"))
    monkeypatch.setattr("sys.argv", ["vila-triton", "chat", "--kv-dtype", "int8", "--page-size", "64"])
    assert main() == 0
    said, about = capsys.readouterr()
    took, then = about.splitlines()
    assert said == "2\n1\n" and took.startswith("[prompt 27 tokens | ")
    assert then.startswith("[prompt 27 tokens, 21 cached | ") and "encoder_attention" not in then
