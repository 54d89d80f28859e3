"""Shared beginnings on a model: what was cached for one question serves the next, and the answers stay the same."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hf_reference import build, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine.engine import admit_sequences, generate_tokens, prefix_keys
from vila_triton.engine.sampling import SamplingParams
from vila_triton.images.feature_cache import ImageFeatureCache, image_hash
from vila_triton.models import llama
from vila_triton.models.vila import splice_image_tokens

MODEL = build(dtype=torch.float32, seed=2, gain=2.0)
IMAGES = pictures(MODEL, 3)
SYSTEM, ASKED, TOKENS = [1, 5, 8], [[9, 30, 7], [9, 31], [44, 9, 30, 7, 12]], 5
FOLLOWING = [17, 3]


class Conversations:
    """Questions about pictures over one cache; `ran` holds how many tokens each pass of the model had."""

    def __init__(self, **how: Any):
        self.cache = PagedKVCache(MODEL.vila_config.llm, how.pop("pages", 0), **{"dtype": MODEL.dtype, **how})
        self.pictures = ImageFeatureCache(MODEL.encode_images)
        self.rows: dict[int, tuple[Tensor, Tensor, list[int]]] = {}  # spliced row [t], features [rows, e], names

    def ask(self, image: int, question: int) -> tuple[int, list[int]]:
        """A new conversation about one picture: its sequence and the answer."""
        features, names = self.pictures(IMAGES[image : image + 1])
        row = splice_image_tokens([torch.tensor([*SYSTEM, -200, *ASKED[question]])], [len(names)], 61)[0]
        seq = self.cache.allocator.add_sequence()
        self.rows[seq] = row, features.flatten(0, 1), names
        return seq, self.answer(seq)

    def again(self, seq: int) -> list[int]:
        """The answer to one more question of the same conversation."""
        row, features, names = self.rows[seq]
        self.rows[seq] = torch.cat((row, torch.tensor(FOLLOWING))), features, names
        return self.answer(seq)

    def answer(self, seq: int) -> list[int]:
        row, features, names = self.rows[seq]
        known = prefix_keys(row, names)
        admit_sequences(self.cache, {seq: known}, TOKENS)
        how = SamplingParams.from_generate_kwargs(1, max_new_tokens=TOKENS)
        new = [
            token
            for _, token in generate_tokens(MODEL.params, {seq: row}, MODEL.vila_config, self.cache, features, how)
        ]
        self.cache.allocator.register_prefix(seq, [*known, *new][: self.cache.length(seq)])
        self.rows[seq] = torch.cat((row, torch.tensor(new))), features, names
        return new


@cache
def alone(image: int, question: int) -> tuple[list[int], list[int]]:
    """The answers to a question and to the one that follows, with nothing cached before."""
    conversations = Conversations()
    seq, answer = conversations.ask(image, question)
    return answer, conversations.again(seq)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the tokens of each pass of the language model, in a list that grows with every pass."""
    counts: list[int] = []
    whole = llama.forward

    def counted(p: Any, x: Tensor, *args: Any) -> Tensor:
        counts.append(len(x))
        return whole(p, x, *args)

    monkeypatch.setattr(llama, "forward", counted)
    yield counts


def test_different_questions_get_different_answers() -> None:
    answers = [tuple(alone(image, question)[0]) for image in range(3) for question in range(3)]
    assert len(set(answers)) == 9


@pytest.mark.parametrize("page_size", [1, 4, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("freed", [True, False])
def test_second_question_about_an_image_runs_only_its_own_tokens(page_size: int, freed: bool, ran: list) -> None:
    conversations = Conversations(page_size=page_size)
    first, _ = conversations.ask(0, 0)
    assert ran.pop(0) == 3 + 9 + 3
    if freed:
        conversations.cache.allocator.free_sequence(first)
    expected = alone(0, 1)[0], alone(0, 2)[0], alone(0, 0)[0]
    ran.clear()
    found = []
    for question, own in ((1, 1), (2, 5), (0, 1)):  # the second begins like the first; all of the last is known
        found.append(conversations.ask(0, question)[1])
        assert ran == [own, 1, 1, 1, 1] or (question == 0 and freed)
        ran.clear()
    assert tuple(found) == expected
    if not freed:
        assert conversations.again(first) == alone(0, 0)[1]  # nobody wrote into its pages


def test_another_image_shares_only_the_text_before_it(ran: list) -> None:
    conversations = Conversations(page_size=4)
    conversations.ask(0, 0)
    expected = alone(1, 0)[0]
    ran.clear()
    assert conversations.ask(1, 0)[1] == expected
    assert ran[0] == 9 + 3


def test_evictable_pages_are_evicted_before_the_pool_grows() -> None:
    conversations = Conversations(page_size=4)
    table = conversations.cache.allocator
    for image in range(3):
        table.free_sequence(conversations.ask(image, 0)[0])
        assert table.num_pages == 5 and not table.ref_counts  # 15 tokens and 5 more


def test_tower_encodes_an_image_once() -> None:
    seen = []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return MODEL.encode_images(pixels)

    known, apart = ImageFeatureCache(encode, max_images=2), ImageFeatureCache(MODEL.encode_images)
    for index, n in (([0, 1, 0], [2]), ([1], [2]), ([0, 2], [2, 1]), ([1], [2, 1, 1])):  # 2 drives out 1
        features, names = known(IMAGES[index])
        assert seen == n and len(names) == len(set(names)) + 9 * (len(index) - len(set(index)))
        for i, picture in enumerate(index):
            torch.testing.assert_close(features[i], MODEL.encode_images(IMAGES[picture : picture + 1])[0])
            assert names[9 * i : 9 * i + 9] == apart(IMAGES[picture : picture + 1])[1]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in known.features.values())  # not those of its batch too


def test_image_hash_depends_on_pixels_dtype_and_shape() -> None:
    picture = IMAGES[0]
    others = [IMAGES[1], picture.half(), picture.view(torch.int32), picture.reshape(3, 10, -1), picture.flip(2)]
    assert len({image_hash(x) for x in [picture, *others]}) == 6
    assert image_hash(picture.clone()) == image_hash(picture.mT.contiguous().mT) == image_hash(picture)


Question = st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from(["free", "keep", "go on"]))


@settings(max_examples=max(15, settings().max_examples // 5))
@given(st.lists(Question, min_size=2, max_size=8), st.sampled_from([1, 4, 16]), st.integers(0, 12))
def test_answers_do_not_depend_on_earlier_questions(asked: list, page_size: int, pages: int) -> None:
    """Pages are few, so that what is known is often driven out."""
    conversations = Conversations(page_size=page_size, pages=pages)
    kept = []
    for image, question, then in asked:
        seq, answer = conversations.ask(image, question)
        assert answer == alone(image, question)[0]
        if then == "go on":
            assert conversations.again(seq) == alone(image, question)[1]
        if then == "keep":
            kept.append((seq, alone(image, question)[1]))
        else:
            conversations.cache.allocator.free_sequence(seq)
    assert [conversations.again(seq) for seq, _ in kept] == [answer for _, answer in kept]
