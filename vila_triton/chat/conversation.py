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

from ..cache.paged_cache import PagedKVCache
from ..checkpoints.generation_config import sampling_arguments
from ..engine.engine import SamplingParams, admit_sequences, check_sampling_arguments, generate_tokens, prefix_keys
from ..hf.modeling_vila_llama import VilaLlamaForCausalLM
from ..images.processing import ImageInput, list_images, load_image, load_image_processor, preprocess_images
from ..limits import COUNT
from ..lock import DeferringLock
from ..models.config_fields import ConfigError
from ..models.params import write_counts
from ..models.vila import splice_image_tokens
from .model_memory import SharedCaches
from .prompts import end_of_turn_ids, first_turn_ids, insert_image_tokens, next_turn_ids, stop_token_ids
from .templates import ChatTemplate, resolve_template
from .tokenizer import load_tokenizer


@dataclass
class TurnStats:
    """What a round took; times in seconds, `new_tokens` is what was prefilled; `seed`: what its answer was drawn with,
    None if it was not drawn: asked with the same it is the same.
    """

    prompt_tokens: int
    prefill_tokens: int
    image_tokens: int
    answer_tokens: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    seed: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        return (
            (self.answer_tokens - 1) / (self.seconds - self.seconds_to_first_token) if self.answer_tokens > 1 else 0.0
        )


@dataclass(frozen=True)
class ChatModel:
    """A model with what it takes to talk to it: its tokenizer and image processor, and what it has seen and said.

    Many conversations may go on at once, in turns or in threads: each answer is what it would be alone. limit: how many
    pages of the cache they may take together; an answer for which there are no more is refused (`OutOfPages`).
    """

    model: VilaLlamaForCausalLM
    tokenizer: Any
    processor: Any
    max_pages: int | None = None
    memory: SharedCaches = field(init=False, repr=False, compare=False)
    tokenizer_lock: DeferringLock = field(
        default_factory=DeferringLock, init=False, repr=False, compare=False
    )  # tokenizers are for one thread

    def __post_init__(self) -> None:
        if self.max_pages is not None:
            COUNT.validate("limit", self.max_pages)
        object.__setattr__(self, "memory", SharedCaches(self.model, self.max_pages))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_pages: int | None = None,
    ) -> "ChatModel":
        """All of a VILA folder. Errors: `LoadError`, `ConfigError`."""
        model = VilaLlamaForCausalLM.from_pretrained(folder, device=device, dtype=dtype)
        chat_model = cls(model, load_tokenizer(Path(folder)), load_image_processor(Path(folder)), max_pages)
        try:
            _ = chat_model.template  # said now, and of the folder
        except ValueError as error:
            raise ConfigError(f"{folder}: {error}") from None
        return chat_model

    @property
    def cache(self) -> PagedKVCache:
        """Keys and values of all its conversations: those that begin alike share their pages."""
        return self.memory.latest().cache

    def preprocess_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the tower takes them, [n, 3, H, W]."""
        return preprocess_images(images, self.processor, getattr(self.model.config, "image_aspect_ratio", None))

    @cached_property
    def template(self) -> ChatTemplate:
        """How conversations are written down. Errors: ValueError for one that does not fit the tokenizer."""
        return resolve_template(getattr(self.model.config, "conversation_template", None), self.tokenizer)

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        eos_token_id = getattr(self.model.generation_config, "eos_token_id", None)
        return stop_token_ids(
            self.template, self.tokenizer, self.model.config.part_configs()["llm"].get("eos_token_id"), eos_token_id
        )

    def prompt_ids(self, question: str, num_images: int, first_turn: bool = True) -> list[int]:
        """Token ids of a round up to where its answer begins, -200 for each picture.

        Errors: ValueError if the question is empty, has places for another number of pictures, or the tokenizer is of
        another model.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        text = insert_image_tokens(question, num_images)
        ids = (first_turn_ids if first_turn else next_turn_ids)(text, self.template, self.tokenizer)
        if max(ids) >= (vocab_size := self.model.vila_config.llm.vocab_size):
            raise ValueError(
                f"tokenizer.json or .model has token {max(ids)}, but vocab_size in config.json is {vocab_size}"
            )
        return ids


class Conversation:
    """Rounds of questions and answers; keeps the spliced tokens, the picture features and a sequence of the cache.

    `close` gives its pages back to the cache, as also happens when the conversation is let go.
    """

    def __init__(self, chat_model: ChatModel):
        self.chat_model = chat_model
        self.spliced_ids = torch.empty(0, dtype=torch.int64, device=chat_model.model.device)  # [t] spliced
        self.image_features: Tensor | None = None  # [rows, e]
        self.feature_keys: list[int] = []  # of the rows of features
        self.model_state: tuple | None = None  # what the features depend on, as in `memory.Known`
        self.turn_starts: list[tuple[int, int]] = []  # how long row and names were before each
        self.last_turn: TurnStats | None = None
        self._answer_lock = threading.Lock()
        self._open_sequence(chat_model.cache)

    def _open_sequence(self, cache: PagedKVCache) -> None:
        with cache.lock:
            self.cache, self.seq = cache, cache.allocator.add_sequence()
        self.close = weakref.finalize(self, cache.lock.run_soon, partial(cache.allocator.free_sequence, self.seq))

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        if not self._answer_lock.acquire(blocking=False):
            raise ValueError("the answer to the question before is not read to its end; read it, or close it")
        try:
            self._require_open()
            yield
        except KeyError:  # its sequence is gone: another thread closed it meanwhile
            self._require_open()
            raise
        finally:
            self._answer_lock.release()

    def _require_open(self) -> None:
        if not self.close.alive:
            raise ValueError("the conversation is closed; begin a new one")

    def fork(self) -> "Conversation":
        """Another conversation with the same rounds, which goes on by itself; both share the pages of these rounds.

        Errors: ValueError if it is closed, or an answer is not read to its end.
        """
        with self._exclusively():
            other = Conversation(self.chat_model)
            other.spliced_ids, other.image_features, other.feature_keys, other.model_state = (
                self.spliced_ids,
                self.image_features,
                self.feature_keys,
                self.model_state,
            )
            other.turn_starts, other.last_turn = [*self.turn_starts], self.last_turn
            return other

    def undo(self, turns: int = 1) -> None:
        """Take the last rounds back. Errors: ValueError if there are fewer; as `fork`."""
        with self._exclusively():
            if not 1 <= turns <= len(self.turn_starts):
                raise ValueError(f"{turns} rounds cannot be taken back; there are {len(self.turn_starts)}")
            length, num_features = self.turn_starts[-turns]
            with self.cache.lock:
                self.cache.allocator.truncate(self.seq, min(length, self.cache.length(self.seq)))
            del self.turn_starts[-turns:]
            self.spliced_ids, self.feature_keys, self.last_turn = (
                self.spliced_ids[:length],
                self.feature_keys[:num_features],
                None,
            )
            self.image_features = (
                self.image_features[:num_features] if self.image_features is not None and num_features else None
            )

    def ask(
        self, question: str, images: ImageInput = (), max_new_tokens: int | None = None, **sampling: Any
    ) -> Generator[int, None, None]:
        """The tokens of the answer as they are chosen; `last` holds what the round took. What is not said is as in the
        model's generation config, else at most 128 tokens are made, each the likeliest.

        Errors: ValueError, before anything is run, if the question is empty or does not fit the model's context, if the
        answer before it was not read to its end, or if the model has changed since it was shown pictures; `OutOfPages`
        beyond the talker's limit; RuntimeError if the model changes meanwhile. If an answer is given up or fails
        half-way, the conversation is as it was before the question.
        """
        with self._exclusively():
            yield from self._answer(question, images, max_new_tokens, sampling)

    def _answer(
        self, question: str, images: ImageInput, max_new_tokens: int | None, sampling: dict[str, Any]
    ) -> Generator[int, None, None]:
        if not isinstance(question, str):
            raise TypeError(f"the question is a {type(question).__name__}, expected a text")
        images = [load_image(image) for image in list_images(images)]
        check_sampling_arguments({"max_new_tokens": max_new_tokens, **sampling})
        start, model = time.perf_counter(), self.chat_model.model
        with self.chat_model.tokenizer_lock:
            prompt_ids = self.chat_model.prompt_ids(question, len(images), first_turn=not len(self.spliced_ids))
            stop_ids, turn_end_ids = (
                self.chat_model.stop_token_ids,
                end_of_turn_ids(self.chat_model.template, self.chat_model.tokenizer),
            )
        ids = torch.tensor(prompt_ids, device=model.device)
        parameters = list(model.parameters())
        initial_versions, remembered = write_counts(parameters), self.chat_model.memory.current()
        if self.image_features is not None and self.model_state != remembered.model_state:
            raise ValueError(
                "the model's parameters, policy or kernels are others than when this conversation was shown its "
                "pictures; begin a new one"
            )
        if remembered.cache is not self.cache:
            self.close()
            self._open_sequence(remembered.cache)
        features, feature_keys, tokens_per_image = self.image_features, self.feature_keys, []
        if images:
            pixel_values = self.chat_model.preprocess_images(images).to(model.device, model.dtype)
            new_features, new_keys = remembered.feature_cache(pixel_values)  # [n, tokens, e]
            feature_keys = [*feature_keys, *new_keys]
            tokens_per_image = [new_features.shape[1]] * len(new_features)
            features = torch.cat([*([] if features is None else [features]), new_features.flatten(0, 1)])
        (new_ids,) = splice_image_tokens(
            [ids], tokens_per_image, model.vila_config.llm.vocab_size, len(self.feature_keys)
        )
        spliced_ids = torch.cat((self.spliced_ids, new_ids))
        context_length = model.vila_config.llm.max_position_embeddings
        generation_options = sampling_arguments(
            model.generation_settings(),
            {**sampling, "max_new_tokens": max_new_tokens},
            len(spliced_ids),
            context_length,
        )
        if len(spliced_ids) + (max_new := int(generation_options["max_new_tokens"])) > context_length:
            raise ValueError(
                f"the conversation has {len(spliced_ids)} tokens, and {max_new} more may be generated, but the model's "
                f"context is {context_length} (max_position_embeddings in config.json); lower max_new_tokens or begin a new one"
            )
        sampling_params = SamplingParams.from_generate_kwargs(
            1, eos_token_id=stop_ids or None, device=model.device, **generation_options
        )
        chunk_size, cache, seq, keys = (
            model.config.prefill_chunk_size,
            self.cache,
            self.seq,
            prefix_keys(spliced_ids, feature_keys),
        )
        with cache.lock:
            cached_length = cache.length(seq)
        answer: list[int] = []
        finished = False
        try:
            admit_sequences(cache, {seq: keys}, max_new)
            stats = TurnStats(len(spliced_ids), len(spliced_ids) - cache.length(seq), sum(tokens_per_image))
            stats.seed = sampling_params.seeds[0] if sampling_params.seeds else None
            for _, token in generate_tokens(
                model.params, {seq: spliced_ids}, model.vila_config, cache, features, sampling_params, chunk_size
            ):
                answer.append(token)
                stats.answer_tokens, stats.seconds = len(answer), time.perf_counter() - start
                stats.seconds_to_first_token = stats.seconds_to_first_token or stats.seconds
                yield token
            if write_counts(parameters) != initial_versions:
                raise RuntimeError("the model's parameters changed while it answered; ask again")
            finished = True
        finally:
            cache.lock.run_soon(
                partial(register_and_truncate, cache, seq, [*keys, *answer], None if finished else cached_length)
            )
        answer = answer[:-1] if answer[-1] in stop_ids else answer  # the last one is not in the cache yet
        answer += turn_end_ids
        self.turn_starts.append((len(self.spliced_ids), len(self.feature_keys)))
        self.spliced_ids = torch.cat((spliced_ids, spliced_ids.new_tensor(answer)))
        self.image_features, self.feature_keys, self.model_state, self.last_turn = (
            features,
            feature_keys,
            remembered.model_state,
            stats,
        )


def register_and_truncate(cache: PagedKVCache, seq: int, tokens: list[int], length: int | None) -> None:
    """Make known what a sequence has of these tokens, and cut it to a length; nothing if it was closed meanwhile."""
    if seq in cache.allocator.sequences:
        cache.allocator.register_prefix(seq, tokens[: cache.length(seq)])
        if length is not None:
            cache.allocator.truncate(seq, length)
