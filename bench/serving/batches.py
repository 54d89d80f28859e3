"""Our own engine on the requests of a trace, without a server: what a server adds is the difference.

Requests that wait are answered together, in one batch, which takes up cached prefixes and image features of earlier
ones; those that come meanwhile wait until all of the batch have ended. So this is the engine of `generate`, and not one
that lets requests in between two tokens.
"""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.chat.conversation import ChatModel, register_and_truncate
from vila_triton.chat.prompts import end_of_turn_ids
from vila_triton.engine.engine import admit_sequences, generate_tokens, prefix_keys
from vila_triton.engine.sampling import SamplingParams
from vila_triton.hf.modeling_vila_llama import VilaLlamaForCausalLM
from vila_triton.images.feature_cache import ImageFeatureCache
from vila_triton.models.vila import splice_image_tokens

from .client import Load, Outcome, arrival_times
from .trace import Request

MAX_BATCH = 16


@dataclass
class BatchEngine:
    """A model that answers requests in batches. It keeps keys, values and image features of all of them."""

    chat_model: ChatModel[VilaLlamaForCausalLM]
    answer_tokens: int
    features: ImageFeatureCache = field(init=False)
    cache: PagedKVCache = field(init=False)

    def __post_init__(self) -> None:
        self.features = ImageFeatureCache(self.chat_model.model.encode_images)
        self.cache = self.chat_model.cache

    def prompt_ids(self, request: Request) -> list[int]:
        """Returns the token ids of a conversation up to the answer, -200 for each image."""
        chat, ids = self.chat_model, []
        for i, turn in enumerate(request.earlier):
            ids += chat.prompt_ids(turn.question, len(request.images) * (i == 0), first_turn=i == 0)
            ids += chat.tokenizer(turn.answer, add_special_tokens=False).input_ids
            ids += end_of_turn_ids(chat.template, chat.tokenizer)
        is_first = not request.earlier
        return ids + chat.prompt_ids(request.question.question, len(request.images) * is_first, first_turn=is_first)

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request], starts: Sequence[float]) -> list[Outcome]:
        """Answers requests in one batch."""
        chat, model, cache = self.chat_model, self.chat_model.model, self.cache
        images = [self.open_image(file) for request in requests for file in request.images]
        features, feature_keys = self.features(chat.preprocess_images(images).to(model.device, model.dtype))
        rows = splice_image_tokens(
            [torch.tensor(self.prompt_ids(request)) for request in requests],
            [features.shape[1]] * len(features),
            model.vila_config.llm.vocab_size,
        )
        prompts = {cache.allocator.add_sequence(): row for row in rows}
        keys = {seq: prefix_keys(row, feature_keys) for seq, row in prompts.items()}
        sampling = SamplingParams.from_generate_kwargs(
            len(rows), eos_token_id=chat.stop_token_ids, max_new_tokens=self.answer_tokens
        )
        answers: dict[int, list[int]] = {seq: [] for seq in prompts}
        times: dict[int, list[float]] = {seq: [] for seq in prompts}
        try:
            admit_sequences(cache, keys, self.answer_tokens)
            for seq, token in generate_tokens(
                model.params, prompts, model.vila_config, cache, features.flatten(0, 1), sampling
            ):
                answers[seq].append(token)
                times[seq].append(time.perf_counter())
        finally:
            for seq in prompts:
                register_and_truncate(cache, seq, [*keys[seq], *answers[seq]], None)
                cache.allocator.free_sequence(seq)
        return [
            Outcome(request, start, times[seq][0], times[seq][-1], len(answers[seq]), self.decode(answers[seq]))
            for request, start, seq in zip(requests, starts, prompts)
        ]

    @staticmethod
    def open_image(file: bytes) -> Image.Image:
        """Returns the image of a PNG file."""
        return Image.open(io.BytesIO(file))

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of an answer."""
        return self.chat_model.tokenizer.decode(tokens, skip_special_tokens=True)

    def ask_all(self, requests: Sequence[Request], load: Load) -> list[Outcome]:
        """Answers requests under a load, as `client.ask_all` asks a server."""
        begin, outcomes = time.perf_counter(), list[Outcome]()
        arrivals = [begin + at for at in arrival_times(requests, load.rate)] if load.rate else None
        while (done := len(outcomes)) < len(requests):
            if arrivals:
                time.sleep(max(0, arrivals[done] - time.perf_counter()))
                waiting = sum(at <= time.perf_counter() for at in arrivals[done:])
                batch = requests[done : done + max(1, min(waiting, MAX_BATCH))]
                starts = arrivals[done : done + len(batch)]
            else:
                batch = requests[done : done + (load.streams or 1)]
                starts = [time.perf_counter()] * len(batch)
            outcomes += self.answer(batch, starts)
        return outcomes
