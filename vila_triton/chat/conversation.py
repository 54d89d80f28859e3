"""Conversations about images: turns that share one paged cache, each prefilling only what is new."""

import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..cache.paged_cache import PagedKVCache
from ..checkpoints.generation_config import sampling_arguments
from ..engine.engine import admit_sequences, generate_tokens, prefix_keys
from ..engine.sampling import SamplingParams, check_sampling_arguments
from ..images.processing import ImageInput, list_images, load_image, preprocess_images
from ..limits import COUNT
from ..lock import DeferringLock
from ..models.vila import splice_image_tokens
from .model_memory import CacheSet, SharedCaches, VilaModel
from .prompts import end_of_turn_ids, first_turn_ids, insert_image_tokens, next_turn_ids, stop_token_ids
from .templates import ChatTemplate, resolve_template

Model = TypeVar("Model", bound=VilaModel, covariant=True)


@dataclass
class TurnStats:
    """Token counts and times (in seconds) of one turn.

    `prefill_tokens` are those of the prompt that were not cached. `seed` is the seed that the answer was sampled with,
    or None if it was greedy; asking again with the same seed gives the same answer.
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
        """Decoding speed after the first token, 0 for an answer of one token."""
        if self.answer_tokens <= 1:
            return 0.0
        return (self.answer_tokens - 1) / (self.seconds - self.seconds_to_first_token)


@dataclass(frozen=True)
class ChatModel(Generic[Model]):
    """A model with its tokenizer and image processor, and the caches that its conversations share.

    Many conversations may go on at once, in turns or in threads; each answer is what it would be alone. `max_pages` is
    the most KV pages that they may take together; an answer that would need more is refused with `OutOfPages`.
    """

    model: Model
    tokenizer: Any
    processor: Any
    max_pages: int | None = None
    memory: SharedCaches = field(init=False, repr=False, compare=False)
    tokenizer_lock: DeferringLock = field(default_factory=DeferringLock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_pages is not None:
            COUNT.validate("max_pages", self.max_pages)
        object.__setattr__(self, "memory", SharedCaches(self.model, self.max_pages))

    @property
    def cache(self) -> PagedKVCache:
        """The paged cache of all its conversations; those that begin alike share pages."""
        return self.memory.latest().cache

    def preprocess_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pixel values [n, 3, H, W] for the vision tower."""
        return preprocess_images(images, self.processor, getattr(self.model.config, "image_aspect_ratio", None))

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Errors: ValueError for one that does not fit the tokenizer."""
        return resolve_template(getattr(self.model.config, "conversation_template", None), self.tokenizer)

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """The token ids that end an answer."""
        llm = self.model.config.part_configs()["llm"]
        configured = llm.get("eos_token_id"), getattr(self.model.generation_config, "eos_token_id", None)
        return stop_token_ids(self.template, self.tokenizer, *configured)

    def prompt_ids(self, question: str, num_images: int, first_turn: bool = True) -> list[int]:
        """Return the token ids of a turn up to where its answer begins, with -200 for each image.

        Errors: ValueError if the question is empty or has `<image>` for another number of images, or if the tokenizer
        is of another model.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        text = insert_image_tokens(question, num_images)
        ids = (first_turn_ids if first_turn else next_turn_ids)(text, self.template, self.tokenizer)
        size = self.model.vila_config.llm.vocab_size
        if max(ids) >= size:
            raise ValueError(f"tokenizer.json or .model has token {max(ids)}, but vocab_size in config.json is {size}")
        return ids


class Conversation:
    """Questions and answers in turn, as one sequence of the model's paged cache.

    `close` gives its pages back to the cache; this also happens when the conversation is garbage-collected.
    """

    def __init__(self, chat_model: ChatModel[VilaModel]):
        self.chat_model = chat_model
        self.spliced_ids = torch.empty(0, dtype=torch.int64, device=chat_model.model.device)  # [t], -1 - r: feature r
        self.image_features: Tensor | None = None  # [rows, e]
        self.feature_keys: list[int] = []  # what the prefix cache knows each row of features by
        self.model_state: tuple | None = None  # of `CacheSet` when the images were encoded
        self.turn_starts: list[tuple[int, int]] = []  # numbers of ids and of feature rows before each turn
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
        """Return a conversation with the same turns that goes on independently; the two share the pages of these turns.

        Errors: ValueError if the conversation is closed, or if an answer is not read to its end.
        """
        with self._exclusively():
            other = Conversation(self.chat_model)
            other.spliced_ids, other.image_features = self.spliced_ids, self.image_features
            other.feature_keys, other.model_state = self.feature_keys, self.model_state
            other.turn_starts, other.last_turn = [*self.turn_starts], self.last_turn
            return other

    def undo(self, turns: int = 1) -> None:
        """Remove the last turns. Errors: ValueError if there are fewer, and as `fork`."""
        with self._exclusively():
            if not 1 <= turns <= len(self.turn_starts):
                raise ValueError(f"{turns} turns cannot be undone; there are {len(self.turn_starts)}")
            length, num_features = self.turn_starts[-turns]
            with self.cache.lock:
                self.cache.allocator.truncate(self.seq, min(length, self.cache.length(self.seq)))
            del self.turn_starts[-turns:]
            self.spliced_ids, self.feature_keys = self.spliced_ids[:length], self.feature_keys[:num_features]
            features = self.image_features
            self.image_features = features[:num_features] if features is not None and num_features else None
            self.last_turn = None

    def ask(
        self, question: str, images: ImageInput = (), max_new_tokens: int | None = None, **sampling: Any
    ) -> Generator[int, None, None]:
        """Yield the tokens of the answer as they are chosen; afterwards `last_turn` holds its statistics.

        `sampling` takes the arguments of `generate`. Those left out are as in the model's generation config, else at
        most 128 tokens are chosen greedily. Errors: ValueError, before the model runs, if the question is empty or does
        not fit the model's context, if the answer before it was not read to its end, or if the model has changed since
        it encoded the conversation's images; `OutOfPages` beyond `ChatModel.max_pages`; RuntimeError if the model
        changes meanwhile. When an answer is abandoned or fails, the conversation is as it was before the question.
        """
        with self._exclusively():
            yield from self._answer(question, images, max_new_tokens, sampling)

    def _answer(
        self, question: str, images: ImageInput, max_new_tokens: int | None, sampling: dict[str, Any]
    ) -> Generator[int, None, None]:
        if not isinstance(question, str):
            raise TypeError(f"the question is a {type(question).__name__}, expected a text")
        images = [load_image(image) for image in list_images(images)]
        options = {**sampling, "max_new_tokens": max_new_tokens}
        check_sampling_arguments(options)
        start, chat_model = time.perf_counter(), self.chat_model
        model, context_length = chat_model.model, chat_model.model.vila_config.llm.max_position_embeddings
        with chat_model.tokenizer_lock:  # a tokenizer serves one thread at a time
            prompt = chat_model.prompt_ids(question, len(images), first_turn=not len(self.spliced_ids))
            stop_ids, turn_end = chat_model.stop_token_ids, end_of_turn_ids(chat_model.template, chat_model.tokenizer)
        initial_versions, caches = model.parameter_versions(), chat_model.memory.current()
        if self.image_features is not None and self.model_state != caches.model_state:
            raise ValueError(
                "the model's parameters, numerics or kernels have changed since it encoded the images of this "
                "conversation; begin a new one"
            )
        if caches.cache is not self.cache:
            self.close()
            self._open_sequence(caches.cache)
        features, feature_keys, tokens_per_image = self._encode(images, caches)
        (new_ids,) = splice_image_tokens(
            [torch.tensor(prompt, device=model.device)],
            tokens_per_image,
            model.vila_config.llm.vocab_size,
            len(self.feature_keys),
        )
        spliced_ids = torch.cat((self.spliced_ids, new_ids))
        options = sampling_arguments(model.generation_settings(), options, len(spliced_ids), context_length)
        if len(spliced_ids) + (max_new := int(options["max_new_tokens"])) > context_length:
            raise ValueError(
                f"the conversation has {len(spliced_ids)} tokens, and {max_new} more may be generated, but the model's "
                f"context is {context_length} (max_position_embeddings in config.json); lower max_new_tokens or begin "
                "a new one"
            )
        params = SamplingParams.from_generate_kwargs(1, eos_token_id=stop_ids or None, **options)
        cache, seq, keys = self.cache, self.seq, prefix_keys(spliced_ids, feature_keys)
        with cache.lock:
            cached_length = cache.length(seq)
        answer: list[int] = []
        finished = False
        try:
            admit_sequences(cache, {seq: keys}, max_new)
            stats = TurnStats(len(spliced_ids), len(spliced_ids) - cache.length(seq), sum(tokens_per_image))
            stats.seed = params.seeds[0] if params.seeds else None
            chunk_size = model.config.prefill_chunk_size
            for _, token in generate_tokens(
                model.params, {seq: spliced_ids}, model.vila_config, cache, features, params, chunk_size
            ):
                answer.append(token)
                stats.answer_tokens, stats.seconds = len(answer), time.perf_counter() - start
                stats.seconds_to_first_token = stats.seconds_to_first_token or stats.seconds
                yield token
            if model.parameter_versions() != initial_versions:
                raise RuntimeError("the model's parameters changed while it answered; ask again")
            finished = True
        finally:
            length = None if finished else cached_length
            cache.lock.run_soon(partial(register_and_truncate, cache, seq, [*keys, *answer], length))
        answer = answer[:-1] if answer[-1] in stop_ids else answer  # the last one is not in the cache yet
        self.turn_starts.append((len(self.spliced_ids), len(self.feature_keys)))
        self.spliced_ids = torch.cat((spliced_ids, spliced_ids.new_tensor(answer + turn_end)))
        self.image_features, self.feature_keys = features, feature_keys
        self.model_state, self.last_turn = caches.model_state, stats

    def _encode(self, images: list[Image.Image], caches: CacheSet) -> tuple[Tensor | None, list[int], list[int]]:
        """Return features [rows, e] and keys of old and new images, and the number of rows of each new image."""
        if not images:
            return self.image_features, self.feature_keys, []
        model = self.chat_model.model
        pixel_values = self.chat_model.preprocess_images(images).to(model.device, model.dtype)
        features, keys = caches.feature_cache(pixel_values)  # [n, tokens, e]
        rows = features.flatten(0, 1)
        rows = rows if self.image_features is None else torch.cat((self.image_features, rows))
        return rows, [*self.feature_keys, *keys], [features.shape[1]] * len(features)


def register_and_truncate(cache: PagedKVCache, seq: int, keys: list[int], length: int | None) -> None:
    """Register the cached ones of these keys as a prefix and truncate the sequence to `length`, if it is still open."""
    if seq in cache.allocator.sequences:
        cache.allocator.register_prefix(seq, keys[: cache.length(seq)])
        if length is not None:
            cache.allocator.truncate(seq, length)
