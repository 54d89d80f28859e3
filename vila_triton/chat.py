"""Conversations about pictures: rounds that share one cache, each prefilling only what is new."""

import time
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .cache import PagedCache
from .engine import Sampling, admit, check_numbers, contents, stream
from .images import image_processor, pixels
from .models.vila import splice
from .models.vila_llama import VilaLlamaForCausalLM
from .pictures import Pictures
from .prompts import closing, first_round, load_tokenizer, next_round, stops, with_pictures
from .templates import Template, template


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
    """A model with what it takes to talk to it: its tokenizer and image processor, and what it has seen and said."""

    model: VilaLlamaForCausalLM
    tokenizer: Any
    processor: Any

    @classmethod
    def from_pretrained(
        cls, folder: Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "Talker":
        """All of a VILA folder. Errors: `LoadError`, `ConfigError`."""
        model = VilaLlamaForCausalLM.from_pretrained(folder, device=device, dtype=dtype)
        return cls(model, load_tokenizer(folder), image_processor(folder))

    @cached_property
    def cache(self) -> PagedCache:
        """Keys and values of all its conversations: those that begin alike share their pages."""
        return self.model.new_cache(0)

    @cached_property
    def pictures(self) -> Pictures:
        """Features of the pictures it was asked about lately."""
        return Pictures(self.model.encode_images)

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
        return stops(self.template, self.tokenizer, self.model.config.parts()["llm"])

    def prompt(self, question: str, pictures: int, first: bool = True) -> list[int]:
        """Token ids of a round up to where its answer begins, -200 for each picture.

        Errors: ValueError if the question is empty, or has places for another number of pictures.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        text = with_pictures(question, pictures)
        return (first_round if first else next_round)(text, self.template, self.tokenizer)


class Conversation:
    """Rounds of questions and answers; keeps the spliced tokens, the picture features and a sequence of the cache.

    `close` gives its pages back to the cache, as also happens when the conversation is let go.
    """

    def __init__(self, talker: Talker):
        self.talker = talker
        self.cache = talker.cache
        self.seq = self.cache.table.alloc()
        self.close = weakref.finalize(self, self.cache.table.free, self.seq)
        self.row = torch.empty(0, dtype=torch.int64, device=talker.model.device)  # [t] spliced
        self.features: Tensor | None = None  # [rows, e]
        self.names: list[int] = []  # of the rows of features
        self.last: Round | None = None
        self.answering = False

    def ask(
        self, question: str, images: Sequence[Image.Image] = (), max_new_tokens: int = 128, **sampling: Any
    ) -> Generator[int, None, None]:
        """The tokens of the answer as they are chosen; `last` holds what the round took.

        Errors: ValueError, before anything is run, if the question is empty or does not fit the model's context, or the
        answer before it was not read to its end. If an answer is given up or fails half-way, the conversation is as it
        was before the question.
        """
        if self.answering:
            raise ValueError("the answer to the question before is not read to its end; read it, or close it")
        check_numbers({"max_new_tokens": max_new_tokens, **sampling})
        start, model = time.perf_counter(), self.talker.model
        ids = torch.tensor(self.talker.prompt(question, len(images), first=not len(self.row)), device=model.device)
        features, names, counts = self.features, self.names, []
        if images:
            pixels = self.talker.pixels(images).to(model.device, model.dtype)
            new, more = self.talker.pictures(pixels)  # [n, tokens, e]
            names = [*names, *more]
            counts = [new.shape[1]] * len(new)
            features = torch.cat([*([] if features is None else [features]), new.flatten(0, 1)])
        (spliced,) = splice([ids], counts, model.geometry.llm.vocab_size, len(self.names))
        row = torch.cat((self.row, spliced))
        limit = model.geometry.llm.max_position_embeddings
        if len(row) + max_new_tokens > limit:
            raise ValueError(
                f"the conversation has {len(row)} tokens, and {max_new_tokens} more may be generated, but the "
                f"model's context is {limit}; lower max_new_tokens or begin a new conversation"
            )
        ends, device = self.talker.stops, model.device
        how = Sampling.of(1, max_new_tokens=max_new_tokens, eos_token_id=ends or None, device=device, **sampling)
        chunk, seq, known = model.config.prefill_chunk_size, self.seq, contents(row, names)
        before = self.cache.length(seq)
        answer: list[int] = []
        finished = False
        self.answering = True
        try:
            admit(self.cache, {seq: known}, max_new_tokens)
            taken = Round(len(row), len(row) - self.cache.length(seq), sum(counts))
            taken.seed = how.seeds[0] if how.seeds else None
            for _, token in stream(model.params, {seq: row}, model.geometry, self.cache, features, how, chunk):
                answer.append(token)
                taken.answer_tokens, taken.seconds = len(answer), time.perf_counter() - start
                taken.first_token = taken.first_token or taken.seconds
                yield token
            finished = True
        finally:
            self.answering = False
            if self.close.alive:
                self.cache.table.publish(seq, [*known, *answer][: self.cache.length(seq)])
                if not finished:
                    self.cache.table.truncate(seq, before)
        answer = answer[:-1] if answer[-1] in ends else answer  # the last one is not in the cache yet
        answer += closing(self.talker.template, self.talker.tokenizer)
        self.row = torch.cat((row, row.new_tensor(answer)))
        self.features, self.names, self.last = features, names, taken
