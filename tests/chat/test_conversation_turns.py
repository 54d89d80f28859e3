"""Conversations of one Talker in any order, in turns and in threads: each answer is what a new Talker gives to the same
rounds, and at the end no page is missing.

Under the numerics "batch_invariant" the logits are compared, bit by bit. Under "fast" what was cached may have other bits than
what is computed in one piece, and the tokens are compared; there is no allowance for ties.
"""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor

from vila_triton.cache.page_allocator import OutOfPages
from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.scenes import draw_scene, random_scene

RNG = random.Random(8)
IMAGES = [draw_scene(random_scene(RNG, "held_out"), RNG) for _ in range(2)]
QUESTIONS = ["How many shapes are there?", "Describe the picture."]
Asked = tuple[int, int | None, int]  # a question, an image and max_new_tokens


@lru_cache(maxsize=1)
def tiny() -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT)


def chat_model(limit: int | None = None) -> ChatModel:
    """The bundled model, with nothing behind it."""
    return ChatModel(tiny().model, tiny().tokenizer, tiny().processor, limit)


@contextmanager
def configured(policy: str, page_size: int) -> Iterator[None]:
    config = tiny().model.config
    before = config.attention_numerics, config.page_size
    config.attention_numerics, config.page_size = policy, page_size
    try:
        yield
    finally:
        config.attention_numerics, config.page_size = before


@dataclass(eq=False)
class Answer:
    """A question on its way: the tokens read so far, and the logits they were chosen by."""

    conversation: Conversation
    asked: Asked
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        question, image, n = self.asked

        def heard(ids: Tensor, scores: Tensor) -> Tensor:
            self.logits.append(scores[0].clone())
            return scores

        images = [] if image is None else [IMAGES[image]]
        self.unread = self.conversation.ask(QUESTIONS[question], images, n, logits_processor=[heard])

    def read(self, n: int | None = None) -> bool:
        """So many tokens more; whether that was all."""
        for _ in range(n or self.asked[2] + 1):
            try:
                self.tokens.append(next(self.unread))
            except StopIteration:
                return True
        return False


@cache
def alone(policy: str, page_size: int, rounds: tuple[Asked, ...]) -> Answer:
    """The last answer of a conversation that is the only one of its Talker."""
    conversation = Conversation(chat_model())
    for asked in rounds:
        answer = Answer(conversation, asked)
        assert answer.read()
    return answer


class Play:
    """One Talker, its conversations with the rounds each has behind it, and the answers that are being read."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.how = self.rng.choice(["batch_invariant", "fast"]), self.rng.choice([4, 16])
        limit = self.rng.choice([None, None, 112 // self.how[1]])  # room for two or three conversations
        self.chat_model = chat_model(limit)
        self.rounds: dict[Conversation, tuple[Asked, ...]] = {}
        self.answers: list[Answer] = []
        self.right = self.refused = 0

    def drawn(self) -> Asked:
        return self.rng.randrange(2), self.rng.choice([None, 0, 1]), self.rng.choice([2, 6])

    def idle(self) -> list[Conversation]:
        busy = [answer.conversation for answer in self.answers]
        return [conversation for conversation in self.rounds if conversation not in busy]

    def check(self, answer: Answer, whole: bool) -> None:
        """Check that the part of an answer that was read is that of a fresh run, all of it if it was read to its end."""
        rounds = (*self.rounds[answer.conversation], answer.asked)
        n, expected = len(answer.tokens), alone(*self.how, rounds)
        assert answer.tokens == (expected.tokens if whole else expected.tokens[:n]), (rounds, whole)
        if self.how[0] == "batch_invariant":
            assert all(torch.equal(a, b) for a, b in zip(answer.logits[:n], expected.logits))
        if whole:
            self.rounds[answer.conversation] = rounds
            self.right += 1

    def begin(self) -> None:
        conversation = self.rng.choice(self.idle())
        answer = Answer(conversation, self.drawn())
        try:
            if answer.read(1):
                self.check(answer, True)
                return
            self.answers.append(answer)
        except OutOfPages as error:
            assert f"the limit is {self.chat_model.max_pages}" in str(error)
            self.refused += 1

    def go_on(self) -> None:
        answer = self.rng.choice(self.answers)
        if answer.read(self.rng.randint(1, 4)):
            self.answers.remove(answer)
            self.check(answer, True)

    def give_up(self) -> None:
        answer = self.answers.pop(self.rng.randrange(len(self.answers)))
        self.check(answer, False)
        if self.rng.random() < 0.5:
            answer.unread.close()
        else:  # it is in a circle with the generator, which holds what listens to it
            del answer
            gc.collect()

    def fork(self) -> None:
        parent = self.rng.choice(self.idle())
        self.rounds[parent.fork()] = self.rounds[parent]

    def undo(self) -> None:
        conversation = self.rng.choice([one for one in self.idle() if self.rounds[one]])
        n = self.rng.randint(1, len(self.rounds[conversation]))
        conversation.undo(n)
        self.rounds[conversation] = self.rounds[conversation][:-n]

    def let_go(self) -> None:
        conversation = self.rng.choice(self.idle())
        del self.rounds[conversation]
        if self.rng.random() < 0.5:
            conversation.close()

    def threads(self) -> None:
        """The rest of all answers, and new ones of the other conversations, each in its own thread."""
        together = self.answers + [Answer(one, self.drawn()) for one in self.idle()]
        ready, failed, refused = Barrier(len(together)), list[Exception](), list[Answer]()

        def run(answer: Answer) -> None:
            ready.wait()
            try:
                assert answer.read()
            except OutOfPages:
                refused.append(answer)
            except Exception as error:
                failed.append(error)

        threads = [Thread(target=run, args=(answer,)) for answer in together]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        self.answers = []
        self.refused += len(refused)
        assert not any(answer.tokens for answer in refused), "an answer that was promised its pages ran out of them"
        for answer in together:
            if answer not in refused:
                self.check(answer, True)

    def step(self) -> None:
        moves = [(self.go_on, 4 * len(self.answers)), (self.give_up, len(self.answers)), (self.fork, len(self.idle()))]
        moves += [(self.undo, sum(1 for one in self.idle() if self.rounds[one])), (self.begin, 4 * len(self.idle()))]
        moves += [(self.let_go, len(self.idle()) if len(self.rounds) > 3 else 0), (self.threads, 1)]
        (move,) = self.rng.choices([move for move, _ in moves], [weight for _, weight in moves])
        move()

    def run(self, steps: int) -> None:
        with configured(*self.how):
            for _ in range(steps):
                if len(self.rounds) < 2:
                    self.rounds[Conversation(self.chat_model)] = ()
                self.step()
            self.threads()
        table = self.chat_model.cache.allocator
        assert table.sequences.keys() == {one.seq for one in self.rounds} and not table.reserved_lens
        self.rounds.clear()
        assert not table.sequences and not table.ref_counts, "a page is held by nobody"
        assert sorted([*table.free_pages, *table.evictable]) == list(range(table.num_pages)), "a page is missing"
        assert self.chat_model.max_pages is None or table.num_pages <= self.chat_model.max_pages


SEEDS = [range(first, first + 50) for first in range(0, 300, 50)]


@pytest.mark.parametrize("seeds", [range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in SEEDS)], ids=str)
def test_random_conversations_in_turns_and_threads_answer_as_each_alone(seeds: range) -> None:
    right = refused = 0
    for seed in seeds:
        play = Play(seed)
        play.run(12)
        right, refused = right + play.right, refused + play.refused
    assert right > 4 * len(seeds) and refused >= len(seeds) // 50
