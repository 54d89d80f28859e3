"""The loop for callers that look at the scores of every step: logits processors and stopping criteria of their own.

Scores and tokens come to the host before the next step begins, so no graph is replayed here; tokens are those of the
static steps of `decode_loop` all the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from ..cache.paged_cache import PagedKVCache
from ..models import llama
from ..models.config import LlamaConfig
from .current_parameters import CurrentParameters
from .decode_step import next_logits
from .default_kernels import use_default_kernels
from .sampling import SamplingParams, check_token, draw_tokens, mark_seen, penalize, seen_tokens, warp


def decode_with_scores(
    p: llama.Llama,
    cfg: LlamaConfig,
    cache: PagedKVCache,
    hidden: Tensor,
    text_ids: Mapping[int, list[int]],
    sampling: SamplingParams,
) -> Iterator[tuple[int, int]]:
    """Continue sequences whose prompts are cached, yielding (sequence id, token) as `generate_tokens` does.

    hidden: [b, e], the last hidden states of the prompts. text_ids: by sequence id, their text tokens, which are
    extended in place.
    """
    pending, device, parameters = list(text_ids), hidden.device, CurrentParameters(p)
    settings = sampling.rows(len(pending), device)
    seen = seen_tokens([*text_ids.values()], cfg.vocab_size, device) if sampling.penalizes else None  # [b, v]
    try:
        for num_drawn in range(sampling.max_new_tokens):
            p = parameters.get()
            logits = next_logits(p, hidden, cache.numerics)  # [b, v]
            scores = logits if seen is None else penalize(logits, settings, seen)
            if sampling.processors:
                scores = process(scores, [text_ids[seq] for seq in pending], sampling.processors)
            scores = warp(scores, settings)
            tokens = draw_tokens(scores, settings, torch.full((len(pending),), num_drawn, device=device))  # [b]
            if seen is not None:
                mark_seen(seen, tokens)
            is_last, kept = num_drawn + 1 == sampling.max_new_tokens, list[int]()
            for i, (seq, token) in enumerate(zip(list(pending), tokens.tolist())):
                check_token(seq, token)
                text_ids[seq].append(token)
                yield seq, token
                if is_last or sampling.has_ended(text_ids[seq], scores[i]):
                    pending.remove(seq)
                    cache.lock.run_soon(partial(cache.allocator.release_reservation, seq))
                else:
                    kept.append(i)
            if not pending:
                return
            if len(kept) < len(tokens):
                index = torch.tensor(kept, dtype=torch.int64, device=device)
                settings, tokens = settings.select(index), tokens[index]
                seen = seen if seen is None else seen[index]
            with (
                cache.lock,
                cache.append_step(dict.fromkeys(pending, 1)) as step,
                use_default_kernels(device, step.phase),
            ):
                p = parameters.get()
                hidden = llama.forward(p, llama.embed(p, tokens), step.positions, cfg, step)
    finally:
        for seq in pending:
            cache.lock.run_soon(partial(cache.allocator.release_reservation, seq))


def process(scores: Tensor, text_ids: Sequence[list[int]], processors: LogitsProcessorList) -> Tensor:
    """Apply logits processors to scores [b, v], each row with its own text tokens -> [b, v]."""
    ids: Any = [torch.tensor([text], device=scores.device) for text in text_ids]
    rows: Any = scores.split(1)
    return torch.cat([processors(text, row) for text, row in zip(ids, rows)])
