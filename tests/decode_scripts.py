"""Scripts of answers over one cache: batches that join and leave, are read in turns, abandoned, forked, rolled back and
continued. Played by the static step and by the open loop, which a logits processor that changes nothing asks for, the
tokens, logits and cached keys and values must be the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from pytest import MonkeyPatch
from torch import Tensor

from vila_triton.cache.page_allocator import OutOfPages
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine import engine
from vila_triton.engine.sampling import SamplingParams
from vila_triton.models import llama

COMMON = [1, 17, 5, 40, 8, 23, 9, 31, 12]  # prompts begin alike
WORDS = st.integers(0, 60)
PROMPT = st.tuples(st.integers(0, len(COMMON)), st.lists(WORDS, min_size=1, max_size=4)).map(
    lambda pair: COMMON[: pair[0]] + pair[1]
)


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(65 + token) for token in ids)


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Arguments of `SamplingParams.from_generate_kwargs`; stops are likely."""
    given: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 20))}
    given["eos_token_id"] = draw(st.lists(WORDS, max_size=4)) or None
    if draw(st.integers(0, 3)) == 0:
        texts = st.lists(st.text([chr(65 + token) for token in range(61)], min_size=1, max_size=2), min_size=1)
        given |= {"stop_strings": draw(texts), "tokenizer": Letters()}
    if draw(st.booleans()):
        given["repetition_penalty"] = draw(st.sampled_from([0.7, 1.3, 2.0]))
    if draw(st.booleans()):
        given |= {"do_sample": True, "seed": draw(st.integers(0, 2**63 - 1))}
        given |= {"temperature": draw(st.sampled_from([0.5, 1.0, 3.0])), "top_k": draw(st.sampled_from([None, 3, 61]))}
        given["top_p"] = draw(st.sampled_from([None, 0.3, 0.8]))
    return given


@dataclass(frozen=True)
class Script:
    """A list of what is done to one cache; numbers of answers and sequences count from the oldest, around the end."""

    cache: dict[str, Any]
    num_pages: int
    reserves: bool  # pages of a whole answer, before it begins
    actions: list[tuple[Any, ...]]


@st.composite
def scripts(draw: Any, on_gpu: bool = False) -> Script:
    """Any script, or one for a GPU, where a step that is run ahead might take pages that are not reserved for it."""
    number = st.integers(0, 3)
    rows = st.lists(st.tuples(st.one_of(st.none(), number), PROMPT), min_size=1, max_size=4)
    ask = st.tuples(st.just("ask"), rows, options())
    read = st.tuples(st.just("read"), number, st.integers(1, 6))
    others = [st.tuples(st.just(name), number) for name in ("close", "fork", "fork", "free")]
    others += [st.tuples(st.just(name), number, st.integers(1, 5)) for name in ("undo", *(() if on_gpu else ("cut",)))]
    actions = st.lists(st.one_of(ask, read, read, read, *others), min_size=4, max_size=12 if on_gpu else 24)
    reserves = on_gpu or draw(st.booleans())
    return Script(
        {
            "page_size": draw(st.sampled_from([4, 1, 2, 16])),
            "kv_dtype": None if on_gpu else draw(st.sampled_from([None, "int8", "int4", "float16"])),
            "numerics": "fast" if on_gpu else draw(st.sampled_from(["fast", "batch_invariant"])),
            "max_pages": draw(st.sampled_from([None, 12, 30])) if reserves else None,
        },
        0 if reserves else draw(st.integers(4, 90)),
        reserves,
        [draw(ask), draw(ask), *draw(actions)],
    )


@dataclass
class Answer:
    """An answer to a batch that is not read to its end, or was."""

    tokens: Iterator[tuple[int, int]]
    sequences: list[int]
    heard: list[tuple[int, int]] = field(default_factory=list)
    end: str = ""


def unchanged(ids: Any, scores: Any) -> Any:
    """A logits processor that only needs scores to be there."""
    return scores


class Player:
    """Plays a script on a new cache."""

    def __init__(self, model: Any, script: Script, opens: bool):
        self.model, self.script, self.opens = model, script, opens
        how = {**script.cache, "device": model.device, "dtype": model.dtype}
        self.cache = PagedKVCache(model.vila_config.llm, script.num_pages, **how)
        self.texts: dict[int, list[int]] = {}  # prompts and the tokens of answers that were read
        self.answers: list[Answer] = []

    def play(self) -> None:
        for name, *given in self.script.actions:
            getattr(self, name)(*given)
        while self.live:
            self.read(0, 1000)

    @property
    def live(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.end]

    @property
    def idle(self) -> list[int]:
        """Sequences that no answer is written to."""
        busy = {seq for answer in self.live for seq in answer.sequences}
        return [seq for seq in self.texts if seq not in busy]

    def ask(self, rows: list[tuple[int | None, list[int]]], how: dict[str, Any]) -> None:
        texts: dict[int, list[int]] = {}
        for number, words in rows:
            idle = [seq for seq in self.idle if seq not in texts]
            seq = self.cache.allocator.add_sequence() if number is None or not idle else idle[number % len(idle)]
            texts[seq] = self.texts.get(seq, []) + words
        if self.script.reserves:
            try:
                engine.admit_sequences(self.cache, texts, how["max_new_tokens"])
            except OutOfPages:
                self.answers.append(Answer(iter(()), [], end="refused"))
                for seq in texts.keys() - self.texts.keys():
                    self.cache.allocator.free_sequence(seq)
                return
        self.texts |= texts
        given: dict[str, Any] = how | ({"logits_processor": [unchanged]} if self.opens else {})
        sampling = SamplingParams.from_generate_kwargs(len(texts), **given)
        prompts = {seq: torch.tensor(text, device=self.model.device) for seq, text in texts.items()}
        chunk = 3 if len(rows) == 2 else None
        tokens = engine.generate_tokens(
            self.model.params, prompts, self.model.vila_config, self.cache, None, sampling, chunk
        )
        self.answers.append(Answer(tokens, list(texts)))

    def read(self, number: int, count: int) -> None:
        """Read tokens of a live answer."""
        if not self.live:
            return
        answer = self.live[number % len(self.live)]
        for _ in range(count):
            try:
                seq, token = next(answer.tokens)
            except StopIteration:
                return self._finish(answer, "ended")
            except OutOfPages:
                return self._finish(answer, "out of pages")
            answer.heard.append((seq, token))
            self.texts[seq].append(token)

    def close(self, number: int) -> None:
        if self.live:
            answer = self.live[number % len(self.live)]
            answer.tokens.close()  # pyright: ignore[reportAttributeAccessIssue]
            self._finish(answer, "closed")

    def _finish(self, answer: Answer, end: str) -> None:
        answer.end = end
        for seq in answer.sequences:
            length = self.cache.length(seq)
            assert length <= len(self.texts[seq]), "a token that nobody read is in the cache"
            self.cache.allocator.register_prefix(seq, self.texts[seq][:length])

    def fork(self, number: int) -> None:
        """Fork a sequence, even one that is being answered."""
        if self.texts:
            seq = list(self.texts)[number % len(self.texts)]
            try:
                other = self.cache.allocator.fork(seq)
            except OutOfPages:
                return
            self.texts[other] = list(self.texts[seq])
            known = min(self.cache.length(other), len(self.texts[other]))  # a GPU may be a step ahead
            self.cache.allocator.truncate(other, known)

    def free(self, number: int) -> None:
        if idle := self.idle:
            seq = idle[number % len(idle)]
            self.cache.allocator.free_sequence(seq)
            del self.texts[seq]

    def undo(self, number: int, count: int) -> None:
        """Forget the last tokens of an idle sequence."""
        if idle := self.idle:
            seq = idle[number % len(idle)]
            del self.texts[seq][-count:]
            self.cache.allocator.truncate(seq, min(self.cache.length(seq), len(self.texts[seq])))

    def cut(self, number: int, count: int) -> None:
        """Take cached tokens from a sequence that is being answered, those before the last one that was read."""
        if self.live:
            answer = self.live[number % len(self.live)]
            seq = answer.sequences[count % len(answer.sequences)]
            length = max(0, self.cache.length(seq) - count)
            if answer.heard and seq not in self.idle:
                self.texts[seq] = self.texts[seq][:length] + self.texts[seq][-1:]
                self.cache.allocator.truncate(seq, length)

    def contents(self) -> dict[int, list[Tensor]]:
        """Return what the pages of each sequence hold, by token."""
        found = {}
        for seq in self.texts:
            pages, length = self.cache.allocator[seq].pages, self.cache.length(seq)
            found[seq] = [x[:, pages].flatten(1, 2)[:, :length].cpu() for x in self.cache.tensors]
        return found


@dataclass(frozen=True)
class Played:
    """The results of a script."""

    heard: list[tuple[list[tuple[int, int]], str]]
    logits: list[Tensor]
    contents: dict[int, list[Tensor]]
    free_pages: int


def play(model: Any, script: Script, opens: bool = False) -> Played:
    """Play a script by the static step, or by the open loop if it `opens`."""
    logits: list[Tensor] = []
    whole = llama.logits

    def heard(*given: Any) -> Tensor:
        logits.append(whole(*given))
        return logits[-1]

    player = Player(model, script, opens)
    with MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(llama, "logits", heard)
        player.play()
    return Played(
        [(answer.heard, answer.end) for answer in player.answers],
        logits,
        player.contents(),
        player.cache.allocator.num_available_pages,
    )
