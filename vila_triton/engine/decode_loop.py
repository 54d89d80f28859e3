"""Answers, one static step after the other (see `decode_step`).

On a GPU the host reads one step behind: it launches a step, and then reads the tokens of the one before, which the
device has chosen meanwhile. The token that such a step caches does not count before it is settled. A row that turns out
to have ended was run once too often: its token never counts, and its page returns; if it ended with a stop token, the
device knew and wrote nothing. On a CPU tokens are read at once, and no row is run once too often.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cache.page_allocator import OutOfPages, PageAllocator
from ..cache.paged_cache import PagedKVCache, step_phase
from ..models import llama
from ..models.config import LlamaConfig
from .current_parameters import CurrentParameters
from .decode_graphs import DecodeSteps, page_bucket, power_of_two_from, row_bucket
from .decode_step import Choosing, StepBuffers, choose_next, next_logits, run_step
from .sampling import SamplingParams, check_token, seen_tokens


@dataclass(eq=False)
class Row:
    """One sequence of a batch: its place in the buffers and, as its last step left them, its length in the cache, and
    the number of its pages with the last of them.
    """

    seq: int
    position: int  # in the batch as it began
    text_ids: list[int]
    index: int = 0
    length: int = 0
    last_page: tuple[int, int] = (0, 0)


class ChosenTokens:
    """The tokens of one step on their way to the host; on a GPU through pinned memory, behind what is queued so far."""

    def __init__(self, tokens: Tensor, rows: Sequence[Row]):
        self.rows, self.indices, self.copied = rows, [row.index for row in rows], None
        if tokens.device.type == "cuda":
            self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self.tokens.copy_(tokens, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(tokens.device))
        else:
            self.tokens = tokens.clone()

    def read(self) -> list[int]:
        """The token of each row. Waits for this step, not for what was queued behind it."""
        if self.copied is not None:
            self.copied.synchronize()
        tokens = self.tokens.tolist()
        return [tokens[index] for index in self.indices]


def pinned(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values on the CPU, from where it can be copied to the device without waiting."""
    x = torch.tensor(values, dtype=dtype)
    return x.pin_memory() if device.type == "cuda" else x


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values on a device; the host does not wait."""
    return pinned(values, dtype, device).to(device, non_blocking=True)


def last_page(pages: Sequence[int]) -> tuple[int, int]:
    """The number of a sequence's pages and the last of them, which tell whether one more token changed its pages."""
    return len(pages), pages[-1] if pages else 0


def end_sequence(allocator: PageAllocator, seq: int) -> None:
    """End the reservation of a sequence, if it is still there, and drop a page that was granted for a step ahead."""
    if seq in allocator.sequences:
        allocator.truncate(seq, allocator[seq].length)


class DecodeLoop:
    """The sequences of one `generate_tokens`, from their first token on."""

    def __init__(
        self,
        p: llama.Llama,
        cfg: LlamaConfig,
        cache: PagedKVCache,
        text_ids: Mapping[int, list[int]],
        sampling: SamplingParams,
    ):
        self.parameters, self.cfg, self.cache, self.sampling = CurrentParameters(p), cfg, cache, sampling
        self.device = p.norm.device
        self.settings = sampling.rows(len(text_ids), self.device)
        self.choosing = Choosing.from_sampling(sampling, self.settings)
        self.rows = {seq: Row(seq, i, ids) for i, (seq, ids) in enumerate(text_ids.items())}
        self.ended: list[Row] = []  # since the last step
        self.num_chosen = 0  # tokens of each row, with those on their way
        self.owner = object()  # of the buffers, while they hold these rows
        self.buffers: StepBuffers | None = None  # as many rows of them as a step takes

    def choose_first(self, hidden: Tensor) -> ChosenTokens:
        """Choose the first token of each row by the last hidden states of its prompt, [b, e]."""
        with self.cache.lock:
            logits = next_logits(self.parameters.get(), hidden, self.cache.numerics)
            buffers = self._load(self._pages_needed()).first_rows(len(hidden))
            choose_next(buffers, logits, self.choosing)
            self.num_chosen += 1
            return ChosenTokens(buffers.tokens, list(self.rows.values()))

    def step(self) -> ChosenTokens:
        """Run one step of all rows, whose last tokens are known. Errors: `OutOfPages`; nothing has changed then."""
        with self.cache.lock:
            return self._step()

    def step_ahead(self) -> ChosenTokens | None:
        """On a GPU, launch the step behind the one whose tokens are on their way. None where that has to wait for them:
        if the rows must be loaded anew, and if there are too few pages, which an answer that ends may give back.
        """
        if self.device.type != "cuda" or self.num_chosen >= self.sampling.max_new_tokens:
            return None
        with self.cache.lock:
            try:
                ahead = self._step() if self._is_loaded(self._pages_needed()) else None
            except OutOfPages:
                return None
            for row in ahead.rows if ahead else ():
                self.cache.allocator.unsettle(row.seq)
            return ahead

    def settle(self, ahead: ChosenTokens) -> bool:
        """Let what a step ahead has cached count, for the rows that go on. False if a sequence is not as it was left;
        then nothing counts, and the step is to be run again.
        """
        with self.cache.lock:
            rows = [row for row in ahead.rows if row.seq in self.rows]
            sequences = [self.cache.allocator[row.seq] for row in rows]
            if all(
                s.length == row.length - 1 and last_page(s.pages) == row.last_page for s, row in zip(sequences, rows)
            ):
                for row in rows:
                    self.cache.allocator.settle(row.seq)
                return True
            self.buffers = None
            self.num_chosen -= 1
            return False

    def end(self, seq: int) -> None:
        """End an answer, whose last step may have been launched ahead."""
        self.ended.append(self.rows.pop(seq))
        self.cache.lock.run_soon(partial(end_sequence, self.cache.allocator, seq))

    def _pages_needed(self) -> int:
        """Pages of the longest sequence with one more token."""
        return max(map(self.cache.length, self.rows)) // self.cache.allocator.page_size + 1

    def _is_loaded(self, pages: int) -> bool:
        """True if the buffers hold these rows as they are now, and a step takes no more rows than it must."""
        steps, buffers = self.cache.decode_steps, self.buffers
        return (
            buffers is not None
            and steps is not None
            and steps.owner is self.owner
            and buffers.num_rows == row_bucket(len(self.rows), self.device)
            and buffers.num_pages >= pages
            and all(self.cache.length(row.seq) == row.length for row in self.rows.values())
        )

    def _step(self) -> ChosenTokens:
        cache, rows, pages = self.cache, list(self.rows.values()), self._pages_needed()
        is_loaded = self._is_loaded(pages)
        buffers = self.buffers if is_loaded and self.buffers else self._load(pages)
        steps: DecodeSteps = cache.decode_steps
        steps.follow_stream()
        try:
            with cache.append_slots(dict.fromkeys(self.rows, 1)):
                self._update(buffers, rows)
                width, p = page_bucket(pages), self.parameters.get()
                steps.run(
                    partial(run_step, p, self.cfg, cache, buffers, width, self.choosing),
                    (buffers.num_rows, width, self.choosing),
                    (self.cfg, self.parameters.places),
                    step_phase([1], cache.numerics),
                )
                chosen = ChosenTokens(buffers.tokens, rows)
        except OutOfPages:
            raise
        except BaseException:
            steps.owner = None
            raise
        for row in rows:
            row.length += 1
        self.num_chosen += 1
        return chosen

    def _update(self, buffers: StepBuffers, rows: Sequence[Row]) -> None:
        """Tell the device which rows have ended, and what pages were granted to others."""
        for row in self.ended:
            buffers.is_live[row.index].fill_(False)
        self.ended.clear()
        updates = [[buffers.num_pages, 0]] * buffers.num_rows
        changes = False
        for row in rows:
            pages = self.cache.allocator[row.seq].pages
            if (last := last_page(pages)) != row.last_page:
                updates[row.index] = [len(pages) - 1, pages[-1]]
                row.last_page, changes = last, True
        if changes:  # else it does no harm that the last ones are made again
            buffers.page_updates.copy_(pinned(updates, torch.int64, self.device), non_blocking=True)

    def _load(self, pages: int) -> StepBuffers:
        """Put the rows into the buffers of the cache, larger ones if need be; their last tokens must be known."""
        cache, rows, device = self.cache, list(self.rows.values()), self.device
        n, width = row_bucket(len(rows), device), page_bucket(pages)
        steps = cache.decode_steps
        if steps is None or not steps.buffers.have_room(n, width, self.cfg.vocab_size):
            context = -(-self.cfg.max_position_embeddings // cache.allocator.page_size)
            room = page_bucket(max(pages, context))
            empty = StepBuffers.empty(power_of_two_from(n), room, self.cfg.vocab_size, device)
            steps = cache.decode_steps = DecodeSteps(empty)
        steps.follow_stream()
        steps.owner, buffers = self.owner, steps.buffers.first_rows(n)
        block_table, numbers = [], []
        for i, row in enumerate(rows):
            page_ids = cache.allocator[row.seq].pages
            row.index, row.length, row.last_page = i, cache.length(row.seq), last_page(page_ids)
            block_table.append(page_ids + [0] * (width - len(page_ids)))
            numbers.append([row.text_ids[-1] if row.text_ids else 0, row.length, row.position])
        tokens, context_lens, positions = upload(numbers, torch.int64, device).unbind(1)
        b = len(rows)
        buffers.tokens[:b].copy_(tokens)
        buffers.context_lens[:b].copy_(context_lens)
        buffers.draws.fill_(self.num_chosen)
        buffers.is_live.fill_(False)
        buffers.is_live[:b].fill_(True)
        buffers.page_updates.fill_(buffers.num_pages)  # which page is written there does not matter
        buffers.block_table[:b, :width].copy_(upload(block_table, torch.int32, device))
        self._load_choosing(buffers, positions)
        self.buffers = buffers
        self.ended.clear()
        return buffers

    def _load_choosing(self, buffers: StepBuffers, positions: Tensor) -> None:
        """Put into the buffers how the rows, those at `positions` [b] of the batch, choose tokens and end."""
        v, b = self.cfg.vocab_size, len(positions)
        stop_ids = [token for token in self.sampling.stop_token_ids if 0 <= token < v]
        buffers.is_stop.fill_(False)
        buffers.is_stop.index_fill_(0, upload(stop_ids, torch.int64, self.device), True)
        settings = self.settings.select(positions)
        for name in (f.name for f in fields(settings)):
            if isinstance(column := getattr(settings, name), Tensor):
                getattr(buffers.sampling, name)[:b].copy_(column)
        if self.sampling.penalizes:
            texts = [row.text_ids for row in self.rows.values()]
            buffers.seen[:b].copy_(seen_tokens(texts, v, self.device))


def decode_tokens(
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
    loop = DecodeLoop(p, cfg, cache, text_ids, sampling)
    try:
        chosen = loop.choose_first(hidden)
        for num_read in range(1, sampling.max_new_tokens + 1):
            ahead = loop.step_ahead()
            for row, token in zip(chosen.rows, chosen.read()):
                if row.seq not in loop.rows:  # it had ended when this step was launched ahead
                    continue
                check_token(row.seq, token)
                row.text_ids.append(token)
                yield row.seq, token
                if num_read == sampling.max_new_tokens or sampling.has_ended(row.text_ids):
                    loop.end(row.seq)
            if not loop.rows:
                return
            chosen = ahead if ahead and loop.settle(ahead) else loop.step()
    finally:
        for seq in list(loop.rows):
            loop.end(seq)
