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
from vila_triton.tiny.evaluate import held_out_question
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
ASKED = [(found.qa.question, found.images) for found in (held_out_question(RNG, kind, n) for kind, n in KINDS)]
ASKED.insert(2, ("How many shapes are there?", []))  # of no picture at all
PICTURES = [draw_scene(random_scene(RNG, "held_out"), RNG) for _ in range(3)]
QUESTIONS = ["How many shapes are there?", "Describe the picture.", "What colour is the shape at the top?"]


@pytest.fixture
def talker(tiny: ChatModel, monkeypatch: pytest.MonkeyPatch) -> ChatModel:
    """The bundled model with nothing cached; changes to its config are forgotten after the test."""
    for name in ("page_size", "kv_dtype", "attention_numerics", "prefill_chunk_size"):
        monkeypatch.setattr(tiny.model.config, name, getattr(tiny.model.config, name))
    return ChatModel(tiny.model, tiny.tokenizer, tiny.processor)


@pytest.fixture(scope="module")
def tiny() -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pictures the vision tower was given, each time it ran."""
    counts: list[int] = []
    whole = vila.encode_images

    def counted(p: Any, pixels: Tensor, *args: Any) -> Tensor:
        counts.append(len(pixels))
        return whole(p, pixels, *args)

    monkeypatch.setattr(vila, "encode_images", counted)
    yield counts


def test_every_answer_is_drawn_anew_and_its_seed_draws_it_again(talker: ChatModel) -> None:
    question, how = ASKED[0], {"do_sample": True, "temperature": 5.0, "max_new_tokens": 12}
    drawn = []
    for seed in (None, None, 0):
        conversation = Conversation(talker)
        tokens = list(conversation.ask(*question, seed=seed, **how))
        assert conversation.last_turn and conversation.last_turn.seed is not None
        assert list(Conversation(talker).ask(*question, seed=conversation.last_turn.seed, **how)) == tokens
        drawn.append((tokens, conversation.last_turn.seed))
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1] and drawn[2][1] == 0
    conversation = Conversation(talker)
    list(conversation.ask(*question))
    assert conversation.last_turn and conversation.last_turn.seed is None


def test_a_number_that_is_none_is_refused_before_a_picture_is_looked_at(talker: ChatModel, seen: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^top_p is nan"):
        list(Conversation(talker).ask("Why?", PICTURES[:1], do_sample=True, top_p=float("nan")))
    assert not seen


def generate(talker: ChatModel, asked: list, **how: Any) -> list[list[int]]:
    """The answers to all in one batch, without what pads them."""
    prompts = [torch.tensor(talker.prompt_ids(question, len(pictures))) for question, pictures in asked]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
    pictures = [picture for _, some in asked for picture in some]
    pixels = talker.preprocess_images(pictures) if pictures else None
    stop = talker.tokenizer.eos_token_id
    answers = talker.model.generate(ids, pixels, mask, max_new_tokens=64, **how).tolist()
    return [answer[: answer.index(stop) + 1] for answer in answers]


@pytest.mark.parametrize(
    "config",
    [{}, {"prefill_chunk_size": 16}, {"page_size": 64, "kv_dtype": "int8"}, {"page_size": 256, "kv_dtype": "int4"}],
    ids=str,
)
def test_eight_conversations_with_different_numbers_of_pictures_answer_as_each_alone(
    talker: ChatModel, config: dict
) -> None:
    for name, value in config.items():
        setattr(talker.model.config, name, value)
    how = {"chunk_prefilling": "prefill_chunk_size" in config}
    together = generate(talker, ASKED, **how)
    assert sorted(len(pictures) for _, pictures in ASKED) == [0, 1, 1, 1, 2, 2, 3, 3]
    assert len({len(answer) for answer in together}) > 3  # they end at different times
    assert together == [answer for one in ASKED for answer in generate(talker, [one], **how)]


def ask(talker: ChatModel, picture: int, question: str) -> tuple[Conversation, list[int]]:
    conversation = Conversation(talker)
    return conversation, list(conversation.ask(question, [PICTURES[picture]]))


@pytest.mark.parametrize("page_size", [16, 256])
def test_a_second_question_about_a_picture_takes_its_own_tokens_and_no_vision(
    talker: ChatModel, page_size: int, seen: list
) -> None:
    talker.model.config.page_size = page_size
    first, _ = ask(talker, 0, QUESTIONS[0])
    assert first.last_turn and first.last_turn.prefill_tokens == first.last_turn.prompt_tokens and seen == [1]
    with count_calls() as calls:
        second, answer = ask(talker, 0, QUESTIONS[1])
    prompts = [talker.prompt_ids(question, 1) for question in QUESTIONS[:2]]
    alike = next(i for i, (a, b) in enumerate(zip(*prompts)) if a != b)
    assert second.last_turn and second.last_turn.prefill_tokens == len(prompts[1]) - alike
    assert seen == [1] and not any(op == "encoder_attention" for op, _ in calls)
    other, _ = ask(talker, 1, QUESTIONS[1])
    before_the_picture = prompts[1].index(-200)
    assert (
        other.last_turn
        and other.last_turn.prompt_tokens - other.last_turn.prefill_tokens == before_the_picture
        and seen == [1, 1]
    )
    assert answer == generate(talker, [(QUESTIONS[1], PICTURES[:1])])[0]


def test_conversations_in_any_order_answer_as_if_they_were_alone(talker: ChatModel) -> None:
    expected = {(i, q): generate(talker, [(q, PICTURES[i : i + 1])])[0] for i in range(3) for q in QUESTIONS}
    assert len({tuple(answer) for answer in expected.values()}) > 4
    rng, kept = random.Random(1), []
    for _ in range(15):
        asked = rng.choice(list(expected))
        conversation, answer = ask(talker, *asked)
        assert answer == expected[asked]
        kept = [*kept, conversation][-3:]  # the others are let go, and with them their sequences
    assert len(talker.cache.allocator.sequences) == 3
    kept.clear()
    del conversation
    assert not talker.cache.allocator.sequences and not talker.cache.allocator.ref_counts


def test_what_was_run_for_a_question_that_was_given_up_is_not_run_again(talker: ChatModel) -> None:
    conversation = Conversation(talker)
    given_up = conversation.ask(QUESTIONS[0], [PICTURES[0]])
    next(given_up)
    given_up.close()
    assert conversation.cache.length(conversation.seq) == 0
    list(conversation.ask(QUESTIONS[0], [PICTURES[0]]))
    assert conversation.last_turn and conversation.last_turn.prefill_tokens == 1


def test_an_answer_that_is_not_read_to_its_end_mixes_with_no_other(talker: ChatModel) -> None:
    _, expected = ask(ChatModel(talker.model, talker.tokenizer, talker.processor), 1, QUESTIONS[0])
    conversation = Conversation(talker)
    unread = conversation.ask(QUESTIONS[0], [PICTURES[0]])
    next(unread)
    for question in QUESTIONS[:2]:
        with pytest.raises(ValueError, match="the question before is not read to its end"):
            list(conversation.ask(question, [PICTURES[1]]))
    assert ask(talker, 1, QUESTIONS[0])[1] == expected
    list(unread)
    assert conversation.last_turn and list(conversation.ask(QUESTIONS[1]))


def test_a_tokenizer_is_asked_by_one_thread_at_a_time(talker: ChatModel) -> None:
    """Those in Rust say "Already borrowed" to the second where the first has to change how they pad or truncate."""
    inside = threading.Lock()

    class Borrowed:
        def __getattr__(self, name: str) -> Any:
            return getattr(talker.tokenizer, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert inside.acquire(blocking=False), "Already borrowed"
            time.sleep(0.01)
            inside.release()
            return talker.tokenizer(*args, **kwargs)

    shared = ChatModel(talker.model, Borrowed(), talker.processor)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: list(Conversation(shared).ask(QUESTIONS[0])), range(4))
        assert list(answers) == [list(Conversation(talker).ask(QUESTIONS[0]))] * 4


@pytest.mark.parametrize("n", [2, 8])
def test_conversations_answered_in_turns_at_default_settings_answer_as_each_alone(talker: ChatModel, n: int) -> None:
    asked = [(i, QUESTIONS[i % 3]) for i in range(n)]
    expected = [generate(talker, [(question, PICTURES[i % 3 : i % 3 + 1])])[0] for i, question in asked]
    unread = {i: Conversation(talker).ask(question, [PICTURES[i % 3]]) for i, question in asked}
    answers: list[list[int]] = [[] for _ in asked]
    while unread:
        for i, answer in list(unread.items()):
            if (token := next(answer, None)) is None:
                del unread[i]
            else:
                answers[i].append(token)
    assert answers == expected and not talker.cache.allocator.reserved_lens


def test_a_pool_with_a_limit_refuses_what_it_could_not_finish(talker: ChatModel) -> None:
    few = ChatModel(talker.model, talker.tokenizer, talker.processor, max_pages=20)
    first, second = Conversation(few), Conversation(few)
    unread = first.ask(QUESTIONS[1], [PICTURES[0]], 150)
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
        list(second.ask(QUESTIONS[0], [PICTURES[1]], 150))
    assert before == (table.sequences, table.evictable, table.reserved_lens, table.free_pages, table.num_pages)
    list(unread)
    assert list(second.ask(QUESTIONS[0], [PICTURES[1]], 150)) == generate(talker, [(QUESTIONS[0], PICTURES[1:2])])[0]
    assert table.num_pages <= 20


def test_a_question_about_another_picture_leaves_what_is_known_while_pages_are_unused(talker: ChatModel) -> None:
    talker.cache.add_pages(40)
    for picture in (0, 1, 2):
        conversation, _ = ask(talker, picture, QUESTIONS[0])
        del conversation
    for picture in (0, 1, 2):
        conversation, _ = ask(talker, picture, QUESTIONS[0])
        assert conversation.last_turn and conversation.last_turn.prefill_tokens == 1


def test_a_round_taken_back_is_still_known_and_forks_go_their_own_ways(talker: ChatModel) -> None:
    conversation, first = ask(talker, 0, QUESTIONS[0])
    talker.cache.add_pages(20)
    described = list(conversation.ask(QUESTIONS[1]))
    conversation.undo()
    assert list(conversation.ask(QUESTIONS[2])) != described
    conversation.undo()
    fork = conversation.fork()
    assert list(fork.ask(QUESTIONS[1])) == described
    assert fork.last_turn and fork.last_turn.prefill_tokens == 1
    conversation.undo()
    assert not len(conversation.spliced_ids) and conversation.image_features is None
    assert list(conversation.ask(QUESTIONS[0], [PICTURES[0]])) == first
    for n in (0, 2, -1):
        with pytest.raises(ValueError, match=f"^{n} rounds cannot be taken back; there are 1$"):
            conversation.undo(n)
    unread = conversation.ask(QUESTIONS[1])
    next(unread)
    for what in (conversation.fork, conversation.undo):
        with pytest.raises(ValueError, match="not read to its end"):
            what()


def test_an_answer_that_the_garbage_collector_ends_in_the_middle_of_a_step_waits_for_nothing(
    talker: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(talker, 0, QUESTIONS[0])[1]
    circle: list[Any] = [Conversation(talker)]
    circle += [circle, circle[0].ask(QUESTIONS[1], [PICTURES[1]])]
    next(circle[2])
    whole = llama.forward

    def collecting(*args: Any) -> Tensor:
        gc.collect()
        return whole(*args)

    monkeypatch.setattr(llama, "forward", collecting)
    gc.disable()
    try:
        del circle
        assert ask(talker, 0, QUESTIONS[0])[1] == expected
    finally:
        gc.enable()
    assert not talker.cache.allocator.sequences and not talker.cache.allocator.reserved_lens


def test_the_command_line_keeps_the_models_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    own = {"attention_numerics": "batch_invariant", "kv_dtype": "int4", "page_size": 256}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    made = list[dict[str, Any]]()
    monkeypatch.setattr(ChatModel, "cache", property(lambda self: made.append(self.model.config.cache()) or 1 / 0))
    for more in ((), ("--kv-dtype", "int8")):
        argv = ["vila-triton", "ask", "--model", str(tmp_path / "model"), *more, "Why?"]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(ZeroDivisionError):
            main()
    assert made[0] == {"numerics": "batch_invariant", "kv_dtype": "int4", "page_size": 256}
    assert made[1] == made[0] | {"kv_dtype": "int8"}


def test_a_closed_conversation_holds_nothing(talker: ChatModel) -> None:
    conversation, _ = ask(talker, 0, QUESTIONS[0])
    conversation.close()
    conversation.close()
    assert not talker.cache.allocator.ref_counts
    for use in (lambda: list(conversation.ask(QUESTIONS[1])), conversation.undo, conversation.fork):
        with pytest.raises(ValueError, match="the conversation is closed; begin a new one"):
            use()
    answered = Conversation(talker)
    answer = answered.ask(QUESTIONS[0])
    next(answer)
    answered.close()
    with pytest.raises(ValueError, match="the conversation is closed; begin a new one"):
        next(answer)
    assert not talker.cache.allocator.sequences and not talker.cache.allocator.reserved_lens


def test_a_new_conversation_on_the_command_line_begins_anew_and_shares_what_is_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    picture = f"/image {BUNDLED_CHECKPOINT.parent / 'examples' / 'a.png'}"
    typed = iter([picture, "How many blue shapes are there?", "/new", picture, "How many yellow shapes are there?"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed, "/quit"))
    monkeypatch.setattr("sys.argv", ["vila-triton", "chat", "--kv-dtype", "int8", "--page-size", "64"])
    assert main() == 0
    said, about = capsys.readouterr()
    took, then = about.splitlines()
    assert said == "2\n1\n" and took.startswith("[prompt 27 tokens | ")
    assert then.startswith("[prompt 27 tokens, 21 cached | ") and "encoder_attention" not in then
