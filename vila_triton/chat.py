"""Conversations about pictures: rounds that share one cache, each prefilling only what is new."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .engine import Sampling, stream
from .images import image_processor, pixels
from .models.vila import splice
from .models.vila_llama import VilaLlamaForCausalLM
from .prompts import template, tokenize, with_pictures


@dataclass
class Round:
    """What a round took; times in seconds, `new_tokens` is what was prefilled."""

    prompt_tokens: int
    new_tokens: int
    image_tokens: int
    answer_tokens: int = 0
    first_token: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        return (self.answer_tokens - 1) / (self.seconds - self.first_token) if self.answer_tokens > 1 else 0.0


@dataclass(frozen=True)
class Talker:
    """A model with what it takes to talk to it: its tokenizer and its image processor."""

    model: VilaLlamaForCausalLM
    tokenizer: Any
    processor: Any

    @classmethod
    def from_pretrained(
        cls, folder: Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "Talker":
        """All of a VILA folder. Errors: `LoadError`, `ConfigError`."""
        from transformers import AutoTokenizer

        model = VilaLlamaForCausalLM.from_pretrained(folder, device=device, dtype=dtype)
        return cls(model, AutoTokenizer.from_pretrained(folder / "llm"), image_processor(folder))

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the tower takes them, [n, 3, H, W]."""
        return pixels(images, self.processor, getattr(self.model.config, "image_aspect_ratio", None))

    def prompt(self, question: str, pictures: int, first: bool = True) -> list[int]:
        """Token ids of a round up to where its answer begins, -200 for each picture."""
        words = template(getattr(self.model.config, "conversation_template", "vicuna_v1"))
        text = with_pictures(question, pictures)
        return tokenize(words.first(text) if first else words.following(text), self.tokenizer, first)


class Conversation:
    """Rounds of questions and answers; keeps the spliced tokens, the picture features and the cache over them."""

    def __init__(self, talker: Talker):
        self.talker = talker
        self.cache = talker.model.new_cache(1)
        self.row = torch.empty(0, dtype=torch.int64, device=talker.model.device)  # [t] spliced
        self.features: Tensor | None = None  # [rows, e]
        self.last: Round | None = None

    def ask(
        self, question: str, images: Sequence[Image.Image] = (), max_new_tokens: int = 128, **sampling: Any
    ) -> Generator[int, None, None]:
        """The tokens of the answer as they are chosen; `last` holds what the round took.

        Errors: ValueError, before anything is run, if the question is empty or does not fit the model's context. If the
        answer is given up or fails half-way, the conversation is as it was before the question.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        start, model = time.perf_counter(), self.talker.model
        ids = torch.tensor(self.talker.prompt(question, len(images), first=not len(self.row)), device=model.device)
        features, counts = self.features, []
        if images:
            new = model.encode_images(self.talker.pixels(images)).detach()  # [n, tokens, e]
            counts = [new.shape[1]] * len(new)
            features = torch.cat([*([] if features is None else [features]), new.flatten(0, 1)])
        known = 0 if self.features is None else len(self.features)
        (spliced,) = splice([ids], counts, model.geometry.llm.vocab_size, known)
        row = torch.cat((self.row, spliced))
        limit = model.geometry.llm.max_position_embeddings
        if len(row) + max_new_tokens > limit:
            raise ValueError(
                f"the conversation has {len(row)} tokens, and {max_new_tokens} more may be generated, but the "
                f"model's context is {limit}"
            )
        cached = self.cache.length(0)
        image_tokens = sum(counts)
        taken = Round(len(row), len(row) - cached, image_tokens)
        eos = model.config.parts()["llm"].get("eos_token_id")
        eos = self.talker.tokenizer.eos_token_id if eos is None else eos
        how = Sampling.of(1, max_new_tokens=max_new_tokens, eos_token_id=eos, device=model.device, **sampling)
        self.cache.reserve({0: len(row) - cached + max_new_tokens})
        chunk = model.config.prefill_chunk_size
        answer: list[int] = []
        finished = False
        try:
            for _, token in stream(model.params, {0: row}, model.geometry, self.cache, features, how, chunk):
                answer.append(token)
                taken.answer_tokens, taken.seconds = len(answer), time.perf_counter() - start
                taken.first_token = taken.first_token or taken.seconds
                yield token
            finished = True
        finally:
            if not finished:
                self.cache.table.truncate(0, cached)
        stop = self.talker.tokenizer.eos_token_id
        answer += [stop] if stop is not None and answer[-1] != stop else []
        self.row, self.features, self.last = torch.cat((row, row.new_tensor(answer))), features, taken
