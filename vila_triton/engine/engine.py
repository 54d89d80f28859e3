"""The engine: prefill, chunked prefill and token-by-token generation on the paged KV cache.

All functions take the parameters, the config and the cache, and keep no state of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..cache.attention_recorder import AttentionRecorder
from ..cache.paged_cache import PagedBatch, PagedKVCache, UncachedBatch
from ..models import llama, vila
from ..models.config import VilaConfig
from .decode_loop import decode_tokens
from .default_kernels import use_default_kernels
from .open_loop import decode_with_scores
from .sampling import SamplingParams

Batch = PagedBatch | UncachedBatch | AttentionRecorder


def encode_images(
    p: vila.Vila, pixels: Tensor, cfg: VilaConfig, numerics: str = "fast", checkpointing: bool = False
) -> Tensor:
    """Encode images [n, c, H, W] -> image features [n, tokens, e], with the kernels configured for prefill.

    With numerics "batch_invariant" images are encoded one by one, so that the features of an image do not depend on the
    others. checkpointing: see `vision.forward`.
    """
    with use_default_kernels(pixels.device, "prefill"):
        if numerics == "batch_invariant" and len(pixels) > 1:
            return torch.cat([vila.encode_images(p, image.clone(), cfg, checkpointing) for image in pixels.split(1)])
        return vila.encode_images(p, pixels, cfg, checkpointing)


def forward(
    p: vila.Vila,
    x: Tensor,
    positions: Tensor,
    cfg: VilaConfig,
    batch: Batch,
    hidden_states: list[Tensor] | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """Run the language model in one pass: embeddings x [s, e] at positions [s] -> final hidden states [s, e].

    `batch` writes keys and values to its pages in place, if it has any (`UncachedBatch` has none). `hidden_states` and
    `checkpointing`: see `llama.forward`.
    """
    with use_default_kernels(x.device, batch.phase):
        return llama.forward(p.llm, x, positions, cfg.llm, batch, hidden_states, checkpointing)


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
    The last token of an answer is not cached. The repetition penalty, logits processors and stopping criteria see text
    tokens only, without images. Between two steps other threads may use the cache, and other iterators of this function
    may be advanced. On a GPU the next step runs while a token is read. Errors: ValueError, `OutOfPages`; RuntimeError
    if the model's scores are not finite numbers.
    """
    pending = {seq: row[cache.length(seq) :] for seq, row in rows.items()}
    for seq, row in pending.items():
        if not len(row):
            raise ValueError(f"sequence {seq}: all {len(rows[seq])} tokens of the prompt are cached, nothing is new")
    text_ids = {seq: row[row >= 0].tolist() for seq, row in rows.items()}
    try:
        with cache.lock:
            hidden = torch.cat(extend(p, pending, cfg, cache, image_features, chunk_size=chunk_size))
    except BaseException:
        for seq in rows:
            cache.lock.run_soon(partial(cache.allocator.release_reservation, seq))
        raise
    decode = decode_with_scores if sampling.needs_scores else decode_tokens
    yield from decode(p.llm, cfg.llm, cache, hidden, text_ids, sampling)
