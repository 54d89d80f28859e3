"""Conversations about pictures: rounds that share one cache, each prefilling only what is new."""

import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..cache.paged_cache import PagedCache
from ..engine.engine import Sampling, admit, check_numbers, contents, stream
from ..engine.generation_config import settled
from ..hf.modeling_vila_llama import VilaLlamaForCausalLM
from ..images.processing import Images, image_processor, listed, loaded, pixels
from ..limits import COUNT
from ..lock import Lock
from ..models.config_fields import ConfigError
from ..models.params import written
from ..models.vila import splice
from .model_memory import Memory
from .prompts import closing, first_round, next_round, stops, with_pictures
from .templates import Template, template
from .tokenizer import load_tokenizer


@dataclass
class Round:
    """What a round took; times in seconds, `new_tokens` is what was prefilled; `seed`: what its answer was drawn with,
    None if it was not drawn: asked with the same it is the same.
    """

    prompt_tokens: int
    new_tokens: int
    image_tokens: int
    answer_tokens: int = 0
    first_token: float = 0.0
    seconds: float = 0.0
    seed: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        return (self.answer_tokens - 1) / (self.seconds - self.first_token) if self.answer_tokens > 1 else 0.0


@dataclass(frozen=True)
class Talker:
    """A model with what it takes to talk to it: its tokenizer and image processor, and what it has seen and said.

    Many conversations may go on at once, in turns or in threads: each answer is what it would be alone. limit: how many
    pages of the cache they may take together; an answer for which there are no more is refused (`OutOfPages`).
    """

    model: VilaLlamaForCausalLM
    tokenizer: Any
    processor: Any
    limit: int | None = None
    memory: Memory = field(init=False, repr=False, compare=False)
    spelling: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)  # tokenizers are for one thread

    def __post_init__(self) -> None:
        if self.limit is not None:
            COUNT.check("limit", self.limit)
        object.__setattr__(self, "memory", Memory(self.model, self.limit))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        limit: int | None = None,
    ) -> "Talker":
        """All of a VILA folder. Errors: `LoadError`, `ConfigError`."""
        model = VilaLlamaForCausalLM.from_pretrained(folder, device=device, dtype=dtype)
        talker = cls(model, load_tokenizer(Path(folder)), image_processor(Path(folder)), limit)
        try:
            _ = talker.template  # said now, and of the folder
        except ValueError as error:
            raise ConfigError(f"{folder}: {error}") from None
        return talker

    @property
    def cache(self) -> PagedCache:
        """Keys and values of all its conversations: those that begin alike share their pages."""
        return self.memory.latest().cache

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the tower takes them, [n, 3, H, W]."""
        return pixels(images, self.processor, getattr(self.model.config, "image_aspect_ratio", None))

    @cached_property
    def template(self) -> Template:
        """How conversations are written down. Errors: ValueError for one that does not fit the tokenizer."""
        return template(getattr(self.model.config, "conversation_template", None), self.tokenizer)

    @cached_property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        said = getattr(self.model.generation_config, "eos_token_id", None)
        return stops(self.template, self.tokenizer, self.model.config.parts()["llm"].get("eos_token_id"), said)

    def prompt(self, question: str, pictures: int, first: bool = True) -> list[int]:
        """Token ids of a round up to where its answer begins, -200 for each picture.

        Errors: ValueError if the question is empty, has places for another number of pictures, or the tokenizer is of
        another model.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        text = with_pictures(question, pictures)
        ids = (first_round if first else next_round)(text, self.template, self.tokenizer)
        if max(ids) >= (size := self.model.geometry.llm.vocab_size):
            raise ValueError(f"tokenizer.json or .model has token {max(ids)}, but vocab_size in config.json is {size}")
        return ids


class Conversation:
    """Rounds of questions and answers; keeps the spliced tokens, the picture features and a sequence of the cache.

    `close` gives its pages back to the cache, as also happens when the conversation is let go.
    """

    def __init__(self, talker: Talker):
        self.talker = talker
        self.row = torch.empty(0, dtype=torch.int64, device=talker.model.device)  # [t] spliced
        self.features: Tensor | None = None  # [rows, e]
        self.names: list[int] = []  # of the rows of features
        self.eyes: tuple | None = None  # what the features depend on, as in `memory.Known`
        self.rounds: list[tuple[int, int]] = []  # how long row and names were before each
        self.last: Round | None = None
        self._turn = threading.Lock()
        self._begin(talker.cache)

    def _begin(self, cache: PagedCache) -> None:
        with cache.lock:
            self.cache, self.seq = cache, cache.table.alloc()
        self.close = weakref.finalize(self, cache.lock.soon, partial(cache.table.free, self.seq))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise ValueError("the answer to the question before is not read to its end; read it, or close it")
        try:
            self._require_open()
            yield
        except KeyError:  # its sequence is gone: another thread closed it meanwhile
            self._require_open()
            raise
        finally:
            self._turn.release()

    def _require_open(self) -> None:
        if not self.close.alive:
            raise ValueError("the conversation is closed; begin a new one")

    def fork(self) -> "Conversation":
        """Another conversation with the same rounds, which goes on by itself; both share the pages of these rounds.

        Errors: ValueError if it is closed, or an answer is not read to its end.
        """
        with self._alone():
            other = Conversation(self.talker)
            other.row, other.features, other.names, other.eyes = self.row, self.features, self.names, self.eyes
            other.rounds, other.last = [*self.rounds], self.last
            return other

    def undo(self, rounds: int = 1) -> None:
        """Take the last rounds back. Errors: ValueError if there are fewer; as `fork`."""
        with self._alone():
            if not 1 <= rounds <= len(self.rounds):
                raise ValueError(f"{rounds} rounds cannot be taken back; there are {len(self.rounds)}")
            length, rows = self.rounds[-rounds]
            with self.cache.lock:
                self.cache.table.truncate(self.seq, min(length, self.cache.length(self.seq)))
            del self.rounds[-rounds:]
            self.row, self.names, self.last = self.row[:length], self.names[:rows], None
            self.features = self.features[:rows] if self.features is not None and rows else None

    def ask(
        self, question: str, images: Images = (), max_new_tokens: int | None = None, **sampling: Any
    ) -> Generator[int, None, None]:
        """The tokens of the answer as they are chosen; `last` holds what the round took. What is not said is as in the
        model's generation config, else at most 128 tokens are made, each the likeliest.

        Errors: ValueError, before anything is run, if the question is empty or does not fit the model's context, if the
        answer before it was not read to its end, or if the model has changed since it was shown pictures; `OutOfPages`
        beyond the talker's limit; RuntimeError if the model changes meanwhile. If an answer is given up or fails
        half-way, the conversation is as it was before the question.
        """
        with self._alone():
            yield from self._answer(question, images, max_new_tokens, sampling)

    def _answer(
        self, question: str, images: Images, max_new_tokens: int | None, sampling: dict[str, Any]
    ) -> Generator[int, None, None]:
        if not isinstance(question, str):
            raise TypeError(f"the question is a {type(question).__name__}, expected a text")
        images = [loaded(picture) for picture in listed(images)]
        check_numbers({"max_new_tokens": max_new_tokens, **sampling})
        start, model = time.perf_counter(), self.talker.model
        with self.talker.spelling:
            prompt = self.talker.prompt(question, len(images), first=not len(self.row))
            ends, end = self.talker.stops, closing(self.talker.template, self.talker.tokenizer)
        ids = torch.tensor(prompt, device=model.device)
        parameters = list(model.parameters())
        before, known = written(parameters), self.talker.memory.holding()
        if self.features is not None and self.eyes != known.eyes:
            raise ValueError(
                "the model's parameters, policy or kernels are others than when this conversation was shown its "
                "pictures; begin a new one"
            )
        if known.cache is not self.cache:
            self.close()
            self._begin(known.cache)
        features, names, counts = self.features, self.names, []
        if images:
            pixels = self.talker.pixels(images).to(model.device, model.dtype)
            new, more = known.pictures(pixels)  # [n, tokens, e]
            names = [*names, *more]
            counts = [new.shape[1]] * len(new)
            features = torch.cat([*([] if features is None else [features]), new.flatten(0, 1)])
        (spliced,) = splice([ids], counts, model.geometry.llm.vocab_size, len(self.names))
        row = torch.cat((self.row, spliced))
        limit = model.geometry.llm.max_position_embeddings
        asked = settled(model.answers(), {**sampling, "max_new_tokens": max_new_tokens}, len(row), limit)
        if len(row) + (new_tokens := int(asked["max_new_tokens"])) > limit:
            raise ValueError(
                f"the conversation has {len(row)} tokens, and {new_tokens} more may be generated, but the model's "
                f"context is {limit} (max_position_embeddings in config.json); lower max_new_tokens or begin a new one"
            )
        how = Sampling.of(1, eos_token_id=ends or None, device=model.device, **asked)
        chunk, cache, seq, content = model.config.prefill_chunk_size, self.cache, self.seq, contents(row, names)
        with cache.lock:
            kept = cache.length(seq)
        answer: list[int] = []
        finished = False
        try:
            admit(cache, {seq: content}, new_tokens)
            taken = Round(len(row), len(row) - cache.length(seq), sum(counts))
            taken.seed = how.seeds[0] if how.seeds else None
            for _, token in stream(model.params, {seq: row}, model.geometry, cache, features, how, chunk):
                answer.append(token)
                taken.answer_tokens, taken.seconds = len(answer), time.perf_counter() - start
                taken.first_token = taken.first_token or taken.seconds
                yield token
            if written(parameters) != before:
                raise RuntimeError("the model's parameters changed while it answered; ask again")
            finished = True
        finally:
            cache.lock.soon(partial(keep, cache, seq, [*content, *answer], None if finished else kept))
        answer = answer[:-1] if answer[-1] in ends else answer  # the last one is not in the cache yet
        answer += end
        self.rounds.append((len(self.row), len(self.names)))
        self.row = torch.cat((row, row.new_tensor(answer)))
        self.features, self.names, self.eyes, self.last = features, names, known.eyes, taken


def keep(cache: PagedCache, seq: int, tokens: list[int], length: int | None) -> None:
    """Make known what a sequence has of these tokens, and cut it to a length; nothing if it was closed meanwhile."""
    if seq in cache.table.sequences:
        cache.table.publish(seq, tokens[: cache.length(seq)])
        if length is not None:
            cache.table.truncate(seq, length)
