"""The engine: prefill, chunked prefill and token-by-token generation on the paged KV cache.

All functions take the parameters, the config and the cache, and keep no state of their own.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteriaList

from ..cache.paged_cache import AttentionRecorder, PagedBatch, PagedKVCache, UncachedBatch, step_phase
from ..checkpoints.generation_config import ARGUMENT_LIMITS
from ..limits import SEED
from ..models import llama, vila
from ..models.config import VilaConfig
from ..registry import default_choices
from ..registry.tuned_tables import default_choices_for
from .stopping import StopStrings

NEEDS_SAMPLING = "temperature, top_k and top_p need do_sample=True: else the likeliest token is taken"
Batch = PagedBatch | UncachedBatch | AttentionRecorder


def use_default_kernels(device: torch.device, phase: str = "prefill") -> AbstractContextManager[None]:
    """Let ops run the implementations that the configs choose for this device and phase.

    phase: "prefill", "decode" or "batch_invariant".
    Errors: ValueError if phase is "batch_invariant" and `use` chose an implementation that is not, of an op that has
    batch-invariant ones.
    """
    return default_choices(default_choices_for(device, phase), batch_invariant=phase == "batch_invariant")


def encode_images(p: vila.Vila, pixels: Tensor, cfg: VilaConfig, numerics: str = "fast") -> Tensor:
    """Encode images [n, c, H, W] -> image features [n, tokens, e], with the kernels configured for prefill.

    With numerics "batch_invariant" images are encoded one by one, so that the features of an image do not depend on the
    others.
    """
    with use_default_kernels(pixels.device, "prefill"):
        if numerics == "batch_invariant" and len(pixels) > 1:
            return torch.cat([vila.encode_images(p, image.clone(), cfg) for image in pixels.split(1)])
        return vila.encode_images(p, pixels, cfg)


def forward(
    p: vila.Vila,
    x: Tensor,
    positions: Tensor,
    cfg: VilaConfig,
    batch: Batch,
    hidden_states: list[Tensor] | None = None,
) -> Tensor:
    """Run the language model in one pass: embeddings x [s, e] at positions [s] -> final hidden states [s, e].

    `batch` writes keys and values to its pages in place, if it has any (`UncachedBatch` has none). `hidden_states`: see
    `llama.forward`.
    """
    with use_default_kernels(x.device, batch.phase):
        return llama.forward(p.llm, x, positions, cfg.llm, batch, hidden_states)


def extend(
    p: vila.Vila,
    rows: Mapping[int, Tensor],
    cfg: VilaConfig,
    cache: PagedKVCache,
    image_features: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    states_to_keep: Mapping[int, int] | None = None,
) -> list[Tensor]:
    """Append spliced ids [t] to each sequence and run the language model over them.

    image_features: [rows, e], which ids below 0 refer to. All else as in `extend_rows`.
    """
    embed = partial(vila.embed_spliced, p, image_features=image_features)
    return extend_rows(p, rows, embed, cfg, cache, chunk_size=chunk_size, states_to_keep=states_to_keep)


def extend_rows(
    p: vila.Vila,
    rows: Mapping[int, Tensor],
    embed: Callable[[Tensor], Tensor],
    cfg: VilaConfig,
    cache: PagedKVCache,
    *,
    chunk_size: int | None = None,
    states_to_keep: Mapping[int, int] | None = None,
    positions: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """Append new tokens to each sequence and run the language model over them -> hidden states [kept, e] of each row.

    rows: by sequence id, a tensor with a row for each new token. embed: turns rows of it into embeddings [t, e].
    chunk_size: the most tokens of a sequence in one pass, so that activations do not grow with the prompt.
    states_to_keep: how many of its last hidden states are returned for each sequence, by default 1.
    positions: [t] for each sequence, by default those behind its cached tokens.
    Errors: `OutOfPages`. After any failure the cache is as it was.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    context_lens = {seq: cache.length(seq) for seq in rows}
    longest = max(map(len, rows.values()))
    kept: dict[int, list[Tensor]] = {seq: [] for seq in rows}
    try:
        for start in range(0, longest, chunk_size or longest):
            chunk_rows = {
                seq: row[start : start + (chunk_size or longest)] for seq, row in rows.items() if len(row) > start
            }
            counts = {seq: len(row) for seq, row in chunk_rows.items()}
            with cache.append_step(counts) as step:
                x = torch.cat([embed(row) for row in chunk_rows.values()])
                chunk_positions = step.positions
                if positions:
                    chunk_positions = torch.cat([positions[seq][start : start + n] for seq, n in counts.items()])
                hidden = forward(p, x, chunk_positions, cfg, step).split(list(counts.values()))
            for (seq, n), states in zip(counts.items(), hidden):
                first_kept = len(rows[seq]) - (states_to_keep[seq] if states_to_keep else 1) - start
                if first_kept < n:
                    kept[seq].append(states[max(first_kept, 0) :].clone())
    except BaseException:
        for seq, length in context_lens.items():
            cache.allocator.truncate(seq, length)
        raise
    width = cfg.llm.hidden_size
    return [torch.cat(k) if k else p.llm.norm.new_empty(0, width) for k in kept.values()]


def prefix_keys(spliced_ids: Tensor, feature_keys: Sequence[int]) -> list[int]:
    """The prefix-cache key of each position of spliced ids [t]: a text token's id, or the key of an image position.

    Spliced ids code an image position as -1 - r for row r of the image features; here it becomes `feature_keys[r]`, a
    negative hash of the image's content (`image_token_key`).
    """
    return [token if token >= 0 else feature_keys[-1 - token] for token in spliced_ids.tolist()]


def admit_sequences(cache: PagedKVCache, keys: Mapping[int, list[int]], max_new_tokens: int) -> None:
    """Prepare the cache for requests: reuse cached prefixes, then reserve pages for prompts and answers until
    `generate_tokens` has ended them.

    keys: by sequence id, the `prefix_keys` of the whole prompt. An empty sequence takes over the pages of its longest
    cached prefix, without its last token, whose logits are needed. Register what a sequence then holds with
    `cache.allocator.register_prefix`.
    Errors: `OutOfPages` beyond the limit of the cache; nothing has changed then.
    """
    with cache.lock:
        cache.admit(keys, max_new_tokens)


def check_sampling_arguments(options: Mapping[str, Any]) -> None:
    """Errors: ValueError naming an argument of `SamplingParams.from_generate_kwargs` that is out of range."""
    for name, limits in ARGUMENT_LIMITS.items():
        if options.get(name) is not None:
            limits.validate(name, options[name])
    seed = options.get("seed")
    for value in seed if isinstance(seed, Sequence) else () if seed is None else (seed,):
        SEED.validate("seed", value)


@dataclass(frozen=True)
class SamplingParams:
    """The choice of the next token and of when to stop, as transformers' logits processors and stopping criteria.

    `seeds`: one for each sequence, or None for greedy decoding. Each sequence draws from a generator of its own, on the
    CPU.
    """

    max_new_tokens: int = 128
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    seeds: Sequence[int] | None = None

    @classmethod
    def from_generate_kwargs(
        cls,
        batch_size: int,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: object = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        device: torch.device | str = "cpu",
    ) -> "SamplingParams":
        """Build the parameters from arguments named as in transformers' `generate`.

        Decoding is greedy unless `do_sample`. Sequence i draws with seed + i, or with seed[i]; without a seed from an
        unpredictable one, which is then in `seeds`. Errors: ValueError naming the argument.
        """
        check_sampling_arguments(locals())
        processors = LogitsProcessorList()  # in transformers' order
        if repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
        processors += logits_processor or []
        if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
            raise ValueError(NEEDS_SAMPLING)
        if temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            processors.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            processors.append(TopPLogitsWarper(float(top_p)))
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if eos_token_id is not None:
            ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
            criteria.append(EosTokenCriteria(torch.tensor(ids, device=device)))
        if stop_strings is not None:
            criteria.append(StopStrings(tokenizer, stop_strings))
        seeds = None
        if do_sample:
            seed = secrets.randbits(32) if seed is None else seed
            seeds = [seed + i for i in range(batch_size)] if isinstance(seed, int) else list(seed)
            if len(seeds) != batch_size:
                raise ValueError(f"{len(seeds)} seeds for {batch_size} prompts")
        return cls(max_new_tokens, processors, criteria, seeds)


@torch.no_grad()
def generate_tokens(
    p: vila.Vila,
    rows: Mapping[int, Tensor],
    cfg: VilaConfig,
    cache: PagedKVCache,
    image_features: Tensor | None,
    sampling: SamplingParams,
    chunk_size: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue sequences, yielding (sequence id, token) as tokens are chosen.

    rows: by sequence id, the spliced ids [t] of the whole prompt; positions that are cached already are not run again.
    The last token of an answer is not cached. Logits processors and stopping criteria see text tokens only, without
    images. Between two steps other threads may use the cache, and other iterators of this function may be advanced.
    """
    pending = {seq: row[cache.length(seq) :] for seq, row in rows.items()}
    for seq, row in pending.items():
        if not len(row):
            raise ValueError(f"sequence {seq}: all {len(rows[seq])} tokens of the prompt are cached, nothing is new")
    text_ids: dict[int, Any] = {seq: row[row >= 0][None] for seq, row in rows.items()}
    generators = {seq: torch.Generator().manual_seed(seed) for seq, seed in zip(rows, sampling.seeds or ())}
    remaining = dict.fromkeys(rows, sampling.max_new_tokens)
    try:
        while pending:
            with cache.lock:
                hidden = torch.cat(extend(p, pending, cfg, cache, image_features, chunk_size=chunk_size))
            with use_default_kernels(hidden.device, step_phase([1], cache.numerics)):
                logits = llama.logits(p.llm, hidden).float()  # [b, v]
            for seq, row_logits in zip(list(pending), logits.split(1)):
                scores: Any = sampling.processors(text_ids[seq], row_logits)  # pyright: ignore[reportArgumentType]
                if generators:
                    token = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generators[seq]).to(scores.device)[
                        0
                    ]
                else:
                    token = scores.argmax(-1)
                text_ids[seq] = torch.cat((text_ids[seq], token[None]), dim=1)
                pending[seq], remaining[seq] = token, remaining[seq] - 1
                yield seq, int(token)
                if not remaining[seq] or (sampling.criteria and bool(sampling.criteria(text_ids[seq], scores).any())):
                    del pending[seq]
                    cache.lock.run_soon(partial(cache.allocator.release_reservation, seq))
    finally:
        for seq in pending:
            cache.lock.run_soon(partial(cache.allocator.release_reservation, seq))
