"""Running the model on the paged cache: prefill in one piece or in chunks, and generation token by token.

Everything here takes the parameters, the config and the cache, and keeps nothing of its own.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
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

from ..cache.paged_cache import PagedKVCache
from ..checkpoints.generation_config import ARGUMENT_LIMITS
from ..limits import SEED
from ..models import llama, vila
from ..models.config import VilaConfig
from ..registry import default_choices
from ..registry.tuned_tables import default_choices_for
from .stopping import StopStrings


def use_default_kernels(
    device: torch.device, decode: bool = False, numerics: str = "fast"
) -> AbstractContextManager[None]:
    """Inside, ops run by default what the configs say for this device and phase, or for the policy "invariant".

    Errors: ValueError for an implementation that `use` chose and that does not keep what the policy promises.
    """
    if numerics == "invariant":
        return default_choices(default_choices_for(device, numerics), batch_invariant=True)
    return default_choices(default_choices_for(device, "decode" if decode else "prefill"))


def encode_images(p: vila.Vila, pixels: Tensor, cfg: VilaConfig, numerics: str = "fast") -> Tensor:
    """Pictures [n, c, H, W] -> features [n, tokens, e], with the kernels configured for prefill.

    Under the policy "invariant" one picture after the other: each is then the same computation as if it were alone.
    """
    with use_default_kernels(pixels.device):
        if numerics == "invariant" and len(pixels) > 1:
            return torch.cat([vila.encode_images(p, image.clone(), cfg) for image in pixels.split(1)])
        return vila.encode_images(p, pixels, cfg)


def forward(
    p: vila.Vila,
    rows: Sequence[Tensor],
    positions: Tensor,
    cfg: VilaConfig,
    cache: llama.AttentionBackend,
    image_features: Tensor | None = None,
    decode: bool = False,
    hidden_states: list[Tensor] | None = None,
) -> list[Tensor]:
    """One pass over rows [t] int64 (spliced) or [t, e]; positions [s] of all of them -> final hidden states [t, e]."""
    with use_default_kernels(positions.device, decode, cache.numerics):
        x = torch.cat([row if row.is_floating_point() else vila.embed_spliced(p, row, image_features) for row in rows])
        return list(llama.forward(p.llm, x, positions, cfg.llm, cache, hidden_states).split([len(row) for row in rows]))


def extend(
    p: vila.Vila,
    rows: Mapping[int, Tensor],
    cfg: VilaConfig,
    cache: PagedKVCache,
    image_features: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    states_to_keep: Mapping[int, int] | None = None,
    positions: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """Append a row of new tokens to each sequence and run the model over them; the cache is written in place.

    rows: by sequence id, a spliced row [t] int64 or its embeddings [t, e]; chunk: at most so many tokens of a sequence
    at a time, so that activations do not grow with the row; keep: how many of its last hidden states each sequence
    returns, 1 unless said; positions [t] per sequence, by default what follows the cached tokens
    -> hidden states [kept, e], in the order of `rows`. Errors: `OutOfPages`; a failure leaves the cache as it was.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk is {chunk_size}, expected at least 1")
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
                chunk_positions = step.positions
                if positions:
                    chunk_positions = torch.cat([positions[seq][start : start + n] for seq, n in counts.items()])
                hidden = forward(p, list(chunk_rows.values()), chunk_positions, cfg, step, image_features, step.decode)
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
    """What the positions of a spliced row [t] are known by: words by their ids, rows of features by these names."""
    return [token if token >= 0 else feature_keys[-1 - token] for token in spliced_ids.tolist()]


def admit_sequences(cache: PagedKVCache, keys: Mapping[int, list[int]], max_new_tokens: int) -> None:
    """Make room in the cache for conversations of these `contents`, by sequence id, and keep it for their answers until
    `stream` has ended them.

    An empty sequence first takes over what the cache knows of its beginning, all but the last token at most. What a
    sequence then holds can be made known in turn: `cache.table.publish`.
    Errors: `OutOfPages` beyond the limit of the pool; nothing has changed then.
    """
    with cache.lock:
        cache.admit(keys, max_new_tokens)


def check_sampling_arguments(options: Mapping[str, Any]) -> None:
    """Errors: ValueError naming one of the arguments of `Sampling.of` that is no number it could be."""
    for name, limits in ARGUMENT_LIMITS.items():
        if options.get(name) is not None:
            limits.validate(name, options[name])
    seed = options.get("seed")
    for value in seed if isinstance(seed, Sequence) else () if seed is None else (seed,):
        SEED.validate("seed", value)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop, in transformers' own processors and criteria.

    `seeds`: one a row; None means greedy. Every row draws from its own generator, on the CPU.
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
        """From the usual arguments. Greedy unless `do_sample`; row i draws with seed + i, or with seed[i]; without a
        seed with one that nobody could know, which is then in `seeds`. Errors: ValueError naming the argument.
        """
        check_sampling_arguments(locals())
        processors = LogitsProcessorList(logits_processor or [])
        if repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
        if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
            raise ValueError("temperature, top_k and top_p need do_sample=True: else the likeliest token is taken")
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
    """Continue conversations, yielding (sequence, token) as tokens are chosen. Between two steps the cache may serve
    other threads, and other streams that are read in turns with this one.

    rows: by sequence id, the whole spliced conversation [t]; what of it is cached already is not run again. The last
    token of an answer is not in the cache afterwards. Processors and criteria see the words so far, without pictures.
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
            with use_default_kernels(hidden.device, decode=True, numerics=cache.numerics):
                logits = llama.logits(p.llm, hidden).float()  # [b, v]
            for seq, row_logits in zip(list(pending), logits.split(1)):
                processed_logits: Any = sampling.processors(text_ids[seq], row_logits)  # pyright: ignore[reportArgumentType]
                if generators:
                    token = torch.multinomial(processed_logits.softmax(-1).cpu(), 1, generator=generators[seq]).to(
                        processed_logits.device
                    )[0]
                else:
                    token = processed_logits.argmax(-1)
                text_ids[seq] = torch.cat((text_ids[seq], token[None]), dim=1)
                pending[seq], remaining[seq] = token, remaining[seq] - 1
                yield seq, int(token)
                if not remaining[seq] or (
                    sampling.criteria and bool(sampling.criteria(text_ids[seq], processed_logits).any())
                ):
                    del pending[seq]
                    cache.lock.run_soon(partial(cache.allocator.release_reservation, seq))
    finally:
        for seq in pending:
            cache.lock.run_soon(partial(cache.allocator.release_reservation, seq))
