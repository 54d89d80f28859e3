"""One forward pass of `VilaLlamaForCausalLM`: checks its arguments, runs an unpadded batch, pads the results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache.attention_recorder import AttentionRecorder
from ..cache.paged_cache import PagedBatch, PagedKVCache, UncachedBatch, step_phase
from ..engine import engine
from ..models import llama, vila
from ..models.config import VilaConfig
from .causal_loss import causal_loss
from .padding import UnpaddedBatch, pad, pad_attentions, require_tensor


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, images: object) -> None:
    """Errors: ValueError, TypeError unless there is one input of a fitting dtype."""
    for name, x in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)):
        if x is not None:
            require_tensor(name, x, "tensor [b, t] of ids or [b, t, e] of embeddings")
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds is needed")
    if images is not None and inputs_embeds is not None:
        raise ValueError("images go into input_ids; inputs_embeds have them already")
    if input_ids is not None and input_ids.is_floating_point():
        raise ValueError("input_ids must be whole numbers")
    if inputs_embeds is not None and not inputs_embeds.is_floating_point():
        raise ValueError("inputs_embeds must not be whole numbers")


def check_options(
    special_token: bool, labels: Tensor | None, logits_to_keep: int, num_items_in_batch: int | Tensor | None
) -> None:
    """Errors: ValueError for options that are not supported together, or at all."""
    if special_token:
        raise ValueError("special_token=True means nothing to this model; leave it False")
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError("logits_to_keep must be 0 (all) or a count")
    if labels is not None and logits_to_keep:
        raise ValueError("labels need all logits, but logits_to_keep is set")
    if num_items_in_batch is not None and not num_items_in_batch > 0:
        raise ValueError(f"num_items_in_batch is {num_items_in_batch}, expected the number of labels of all batches")


def check_chunked_prefill(chunk_size: int | None, output_attentions: bool, output_hidden_states: bool) -> None:
    """Errors: ValueError for a chunk size below 1, and for outputs that need the whole sequence in one pass."""
    if (chunk_size or 0) < 1:
        raise ValueError("config.prefill_chunk_size must be at least 1")
    for name, output in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
        if output:
            raise ValueError(f"{name} needs one pass; chunk_prefilling makes many")


def keep_embeddings(row: Tensor) -> Tensor:
    """The `embed` of a batch whose rows are embeddings already."""
    return row


@dataclass
class ForwardPass:
    """A batch on its way through the language model; `embed` turns its rows into embeddings [t, e]."""

    p: vila.Vila
    cfg: VilaConfig
    batch: UnpaddedBatch
    embed: Callable[[Tensor], Tensor]
    logits_to_keep: int  # the last positions of the padded layout; 0 keeps all
    hidden_states: list[Tensor] | None  # filled with the input of each layer and the result [s, e]
    attentions: list[list[Tensor]] | None  # filled with the attention weights of each layer and sequence [h, t, t]
    num_kept: list[int] = field(init=False)  # rows of logits of each sequence

    def __post_init__(self) -> None:
        self.num_kept = self.batch.mask[:, -self.logits_to_keep :].sum(1).tolist()

    def run_uncached(self, device: torch.device, checkpointing: bool) -> Tensor:
        """Run without a cache -> the last logits of each sequence, end to end [s, v]; checkpointing: see
        `llama.forward`.
        """
        step = UncachedBatch([len(row) for row in self.batch.rows], device)
        return self._logits(self._run_step(step, checkpointing), step.numerics)

    def run_cached(self, cache: PagedKVCache, sequences: Sequence[int], chunk_size: int | None) -> Tensor:
        """Append the batch to these sequences of a cache -> the last logits of each, end to end [s, v]."""
        rows = dict(zip(sequences, self.batch.rows))
        counts = {seq: len(row) for seq, row in rows.items()}
        cache.ensure_capacity(counts)
        if chunk_size is None:
            with cache.append_step(counts) as step:
                hidden = self._run_step(step)
        else:
            hidden = engine.extend_rows(
                self.p,
                rows,
                self.embed,
                self.cfg,
                cache,
                chunk_size=chunk_size,
                states_to_keep=dict(zip(rows, self.num_kept)),
                positions=dict(zip(rows, self.batch.positions)) if self.batch.positions else None,
            )
        return self._logits(hidden, cache.numerics)

    def outputs(self, logits: Tensor, num_items_in_batch: int | Tensor | None) -> dict[str, Any]:
        """The padded outputs by their names in `CausalLMOutputWithPast`; num_items_in_batch: see `causal_loss`."""
        batch = self.batch
        return {
            "loss": causal_loss(logits, batch.labels, num_items_in_batch) if batch.labels is not None else None,
            "logits": pad(logits, batch.mask[:, -self.logits_to_keep :]),
            "hidden_states": tuple(pad(x, batch.mask) for x in self.hidden_states or ()) or None,
            "attentions": tuple(pad_attentions(x, batch.mask) for x in self.attentions or ()) or None,
        }

    def _run_step(self, step: PagedBatch | UncachedBatch, checkpointing: bool = False) -> list[Tensor]:
        backend = step if self.attentions is None else AttentionRecorder(step, self.attentions)
        positions = torch.cat(self.batch.positions) if self.batch.positions else step.positions
        x = self.embed(torch.cat(self.batch.rows))
        hidden = engine.forward(self.p, x, positions, self.cfg, backend, self.hidden_states, checkpointing)
        rows = hidden.split([len(row) for row in self.batch.rows])
        return [row[len(row) - n :] for row, n in zip(rows, self.num_kept)]

    def _logits(self, hidden: Sequence[Tensor], numerics: str) -> Tensor:
        x = torch.cat(list(hidden))
        with engine.use_default_kernels(x.device, step_phase(map(len, self.batch.rows), numerics)):
            return llama.logits(self.p.llm, x)
