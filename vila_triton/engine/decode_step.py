"""One step of decoding whose shapes and addresses are fixed: every row takes its last token, and chooses the next.

All that a step reads lies in `StepBuffers`, and it leaves there what the next one reads. Positions, slots and rotary
angles are computed on the device, the token is chosen there, and a row that has chosen a stop token is no longer live.
So the host need not know a token before the next step begins, and a GPU can replay a step as a graph.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..cache.paged_cache import PagedKVCache, step_phase
from ..cache.paged_tensors import outside_inference_mode
from ..models import llama
from ..models.config import LlamaConfig
from .default_kernels import use_default_kernels
from .sampling import SamplingParams, SamplingRows, choose_tokens, mark_seen


@dataclass(frozen=True)
class Choosing:
    """The parts of choosing that a step computes, for all of its rows; the numbers are those of `SamplingRows`."""

    samples: bool
    largest_top_k: int
    uses_top_p: bool
    penalizes: bool

    @classmethod
    def from_sampling(cls, sampling: SamplingParams, rows: SamplingRows) -> "Choosing":
        return cls(rows.samples, rows.largest_top_k, rows.uses_top_p, sampling.penalizes)


@dataclass(frozen=True)
class StepBuffers:
    """The state of a step of r rows, each of which is one sequence or, if it is not live, none.

    tokens        [r] int64: the last token of each row, which is not cached yet
    context_lens  [r] int64: its cached tokens
    draws         [r] int64: how many tokens it has chosen
    is_live       [r] bool
    page_updates  [r, 2] int64: a column of each row's block table and the page to be written there; the last column,
                  which is no sequence's, if nothing changes
    block_table   [r, pages + 1] int32
    seen          [r, v] bool: the tokens that count as repeated
    is_stop       [v] bool: the tokens that end an answer
    sampling      how each row chooses; the numbers in it count for nothing, see `Choosing`
    """

    tokens: Tensor
    context_lens: Tensor
    draws: Tensor
    is_live: Tensor
    page_updates: Tensor
    block_table: Tensor
    seen: Tensor
    is_stop: Tensor
    sampling: SamplingRows

    @classmethod
    def empty(cls, rows: int, pages: int, vocab_size: int, device: torch.device) -> "StepBuffers":
        """Buffers of which no row is live."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        with outside_inference_mode():
            return cls(
                *(zeros(rows) for _ in range(3)),
                is_live=zeros(rows, dtype=torch.bool),
                page_updates=zeros(rows, 2),
                block_table=zeros(rows, pages + 1, dtype=torch.int32),
                seen=zeros(rows, vocab_size, dtype=torch.bool),
                is_stop=zeros(vocab_size, dtype=torch.bool),
                sampling=SamplingParams().rows(rows, device),
            )

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def num_pages(self) -> int:
        """Pages that a sequence can have here."""
        return self.block_table.shape[1] - 1

    def have_room(self, rows: int, pages: int, vocab_size: int) -> bool:
        """True if a step of so many rows can be run here, of a model with just this vocabulary."""
        return self.num_rows >= rows and self.num_pages >= pages and len(self.is_stop) == vocab_size

    def first_rows(self, n: int) -> "StepBuffers":
        """The first n rows, in the same memory."""
        columns = {
            f.name: x[:n] for f in fields(self.sampling) if isinstance(x := getattr(self.sampling, f.name), Tensor)
        }
        return StepBuffers(
            self.tokens[:n],
            self.context_lens[:n],
            self.draws[:n],
            self.is_live[:n],
            self.page_updates[:n],
            self.block_table[:n],
            self.seen[:n],
            self.is_stop,
            replace(self.sampling, **columns),
        )


def run_step(
    p: llama.Llama, cfg: LlamaConfig, cache: PagedKVCache, buffers: StepBuffers, pages: int, choosing: Choosing
) -> None:
    """Run the last token of every live row, whose slot was granted, and choose the next; all in the buffers, in place.

    pages: columns of the block table that are looked at.
    """
    column, page = buffers.page_updates.split(1, dim=1)  # [r, 1] each
    buffers.block_table.scatter_(1, column, page.int())
    batch = cache.decode_batch(buffers.block_table[:, :pages], buffers.context_lens, buffers.is_live)
    tokens = buffers.tokens.masked_fill(~buffers.is_live, 0)
    with use_default_kernels(tokens.device, batch.phase):
        hidden = llama.forward(p, llama.embed(p, tokens), batch.positions, cfg, batch)
    buffers.context_lens.add_(buffers.is_live)
    choose_next(buffers, next_logits(p, hidden, cache.numerics), choosing)


def next_logits(p: llama.Llama, hidden: Tensor, numerics: str) -> Tensor:
    """The logits that the next tokens are chosen by: hidden states [b, e] -> [b, v] float32."""
    with use_default_kernels(hidden.device, step_phase([1], numerics)):
        return llama.logits(p, hidden).float()


def choose_next(buffers: StepBuffers, logits: Tensor, choosing: Choosing) -> None:
    """Choose the next token of every row by logits [r, v]: it, and what follows of it, is left in the buffers."""
    rows = replace(
        buffers.sampling,
        samples=choosing.samples,
        largest_top_k=choosing.largest_top_k,
        uses_top_p=choosing.uses_top_p,
    )
    tokens = choose_tokens(logits, rows, buffers.draws, buffers.seen if choosing.penalizes else None)
    if choosing.penalizes:
        mark_seen(buffers.seen, tokens)
    buffers.tokens.copy_(tokens)
    buffers.draws.add_(1)
    goes_on = (tokens >= 0) & ~buffers.is_stop.index_select(0, tokens.clamp(min=0))  # `NO_TOKEN` is below 0
    buffers.is_live.logical_and_(goes_on)
