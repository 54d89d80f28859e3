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

from ..cache.paged_cache import PagedCache
from ..limits import SEED
from ..models import llama, vila
from ..models.config import VilaConfig
from ..registry import defaults
from ..registry.tuned_tables import kernels_for
from .generation_config import NUMBERS
from .stopping import StopStrings


def kernels(device: torch.device, decode: bool = False, policy: str = "fast") -> AbstractContextManager[None]:
    """Inside, ops run by default what the configs say for this device and phase, or for the policy "invariant".

    Errors: ValueError for an implementation that `use` chose and that does not keep what the policy promises.
    """
    if policy == "invariant":
        return defaults(kernels_for(device, policy), invariant=True)
    return defaults(kernels_for(device, "decode" if decode else "prefill"))


def encode_images(p: vila.Vila, pixels: Tensor, cfg: VilaConfig, policy: str = "fast") -> Tensor:
    """Pictures [n, c, H, W] -> features [n, tokens, e], with the kernels configured for prefill.

    Under the policy "invariant" one picture after the other: each is then the same computation as if it were alone.
    """
    with kernels(pixels.device):
        if policy == "invariant" and len(pixels) > 1:
            return torch.cat([vila.encode_images(p, one.clone(), cfg) for one in pixels.split(1)])
        return vila.encode_images(p, pixels, cfg)


def run(
    p: vila.Vila,
    rows: Sequence[Tensor],
    positions: Tensor,
    cfg: VilaConfig,
    cache: llama.Cache,
    features: Tensor | None = None,
    decode: bool = False,
    states: list[Tensor] | None = None,
) -> list[Tensor]:
    """One pass over rows [t] int64 (spliced) or [t, e]; positions [s] of all of them -> final hidden states [t, e]."""
    with kernels(positions.device, decode, cache.policy):
        x = torch.cat([row if row.is_floating_point() else vila.embed(p, row, features) for row in rows])
        return list(llama.llama(p.llm, x, positions, cfg.llm, cache, states).split([len(row) for row in rows]))


def advance(
    p: vila.Vila,
    rows: Mapping[int, Tensor],
    cfg: VilaConfig,
    cache: PagedCache,
    features: Tensor | None = None,
    *,
    chunk: int | None = None,
    keep: Mapping[int, int] | None = None,
    positions: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """Append a row of new tokens to each sequence and run the model over them; the cache is written in place.

    rows: by sequence id, a spliced row [t] int64 or its embeddings [t, e]; chunk: at most so many tokens of a sequence
    at a time, so that activations do not grow with the row; keep: how many of its last hidden states each sequence
    returns, 1 unless said; positions [t] per sequence, by default what follows the cached tokens
    -> hidden states [kept, e], in the order of `rows`. Errors: `OutOfPages`; a failure leaves the cache as it was.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")
    before = {seq: cache.length(seq) for seq in rows}
    longest = max(map(len, rows.values()))
    kept: dict[int, list[Tensor]] = {seq: [] for seq in rows}
    try:
        for start in range(0, longest, chunk or longest):
            part = {seq: row[start : start + (chunk or longest)] for seq, row in rows.items() if len(row) > start}
            counts = {seq: len(row) for seq, row in part.items()}
            with cache.step(counts) as step:
                at = step.positions
                if positions:
                    at = torch.cat([positions[seq][start : start + n] for seq, n in counts.items()])
                hidden = run(p, list(part.values()), at, cfg, step, features, step.decode)
            for (seq, n), states in zip(counts.items(), hidden):
                first_kept = len(rows[seq]) - (keep[seq] if keep else 1) - start
                if first_kept < n:
                    kept[seq].append(states[max(first_kept, 0) :].clone())
    except BaseException:
        for seq, length in before.items():
            cache.table.truncate(seq, length)
        raise
    width = cfg.llm.hidden_size
    return [torch.cat(k) if k else p.llm.norm.new_empty(0, width) for k in kept.values()]


def contents(row: Tensor, names: Sequence[int]) -> list[int]:
    """What the positions of a spliced row [t] are known by: words by their ids, rows of features by these names."""
    return [token if token >= 0 else names[-1 - token] for token in row.tolist()]


def admit(cache: PagedCache, known: Mapping[int, list[int]], max_new_tokens: int) -> None:
    """Make room in the cache for conversations of these `contents`, by sequence id, and keep it for their answers until
    `stream` has ended them.

    An empty sequence first takes over what the cache knows of its beginning, all but the last token at most. What a
    sequence then holds can be made known in turn: `cache.table.publish`.
    Errors: `OutOfPages` beyond the limit of the pool; nothing has changed then.
    """
    with cache.lock:
        cache.admit(known, max_new_tokens)


def check_numbers(how: Mapping[str, Any]) -> None:
    """Errors: ValueError naming one of the arguments of `Sampling.of` that is no number it could be."""
    for name, limits in NUMBERS.items():
        if how.get(name) is not None:
            limits.check(name, how[name])
    seed = how.get("seed")
    for one in seed if isinstance(seed, Sequence) else () if seed is None else (seed,):
        SEED.check("seed", one)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop, in transformers' own processors and criteria.

    `seeds`: one a row; None means greedy. Every row draws from its own generator, on the CPU.
    """

    max_new_tokens: int = 128
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    seeds: Sequence[int] | None = None

    @classmethod
    def of(
        cls,
        rows: int,
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
    ) -> "Sampling":
        """From the usual arguments. Greedy unless `do_sample`; row i draws with seed + i, or with seed[i]; without a
        seed with one that nobody could know, which is then in `seeds`. Errors: ValueError naming the argument.
        """
        check_numbers(locals())
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
            seeds = [seed + i for i in range(rows)] if isinstance(seed, int) else list(seed)
            if len(seeds) != rows:
                raise ValueError(f"{len(seeds)} seeds for {rows} prompts")
        return cls(max_new_tokens, processors, criteria, seeds)


@torch.no_grad()
def stream(
    p: vila.Vila,
    rows: Mapping[int, Tensor],
    cfg: VilaConfig,
    cache: PagedCache,
    features: Tensor | None,
    sampling: Sampling,
    chunk: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue conversations, yielding (sequence, token) as tokens are chosen. Between two steps the cache may serve
    other threads, and other streams that are read in turns with this one.

    rows: by sequence id, the whole spliced conversation [t]; what of it is cached already is not run again. The last
    token of an answer is not in the cache afterwards. Processors and criteria see the words so far, without pictures.
    """
    new = {seq: row[cache.length(seq) :] for seq, row in rows.items()}
    for seq, row in new.items():
        if not len(row):
            raise ValueError(f"sequence {seq}: all {len(rows[seq])} tokens of the prompt are cached, nothing is new")
    words: dict[int, Any] = {seq: row[row >= 0][None] for seq, row in rows.items()}
    draws = {seq: torch.Generator().manual_seed(seed) for seq, seed in zip(rows, sampling.seeds or ())}
    left = dict.fromkeys(rows, sampling.max_new_tokens)
    try:
        while new:
            with cache.lock:
                hidden = torch.cat(advance(p, new, cfg, cache, features, chunk=chunk))
            with kernels(hidden.device, decode=True, policy=cache.policy):
                logits = llama.logits(p.llm, hidden).float()  # [b, v]
            for seq, raw in zip(list(new), logits.split(1)):
                scores: Any = sampling.processors(words[seq], raw)  # pyright: ignore[reportArgumentType]
                if draws:
                    token = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=draws[seq]).to(scores.device)[0]
                else:
                    token = scores.argmax(-1)
                words[seq] = torch.cat((words[seq], token[None]), dim=1)
                new[seq], left[seq] = token, left[seq] - 1
                yield seq, int(token)
                if not left[seq] or (sampling.criteria and bool(sampling.criteria(words[seq], scores).any())):
                    del new[seq]
                    cache.lock.soon(partial(cache.table.release, seq))
    finally:
        for seq in new:
            cache.lock.soon(partial(cache.table.release, seq))
