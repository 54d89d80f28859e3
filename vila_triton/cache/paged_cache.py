"""The paged KV cache as tensors, and what attention sees of it during one step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_triton.models.config import LlamaConfig
from vila_triton.ops import Pages, decode_attention, empty_pages, leaves, prefill_attention, rope, rope_kv_write
from vila_triton.ops.attention import causal, check_policy, weights
from vila_triton.ops.kv_pages import encode

from ..lock import Lock
from .page_allocator import OutOfPages, PageTable

PAGE_SIZE = 16
Rotary = tuple[Tensor, Tensor]  # as in `models.llama`
KV_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside can be used and written anywhere later, though `torch.inference_mode` is around it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def mapped(fn: Callable[[Tensor], Tensor], pages: Pages) -> Pages:
    """Pages with fn applied to the tensors they are made of."""
    return fn(pages) if isinstance(pages, Tensor) else pages.map(fn)


def as_cached(x: Tensor, pages: Pages) -> Tensor:
    """New keys or values [s, g, d] as they will be read from these pages."""
    held = encode(x, pages)
    return (held if isinstance(held, Tensor) else held.dense()).to(x.dtype)


@dataclass(frozen=True)
class Step:
    """One step of a ragged batch: where its s new tokens go, and what their b sequences hold before them.

    A step of one token a sequence is a decode step. `attend` writes the pages in place. Under the "invariant" policy no
    step is, as decode kernels add up in another order; and a chunk sees its own keys and values as later ones will. So
    it does not matter where chunks end, nor what was prompt and what answer.
    """

    k_pages: Pages  # [layers, p, l, g, d]
    v_pages: Pages  # [layers, p, l, g, d]
    slot_mapping: Tensor  # [s] int64
    block_table: Tensor  # [b, pages] int32
    query_start: Tensor  # [b+1] int32
    history: Tensor  # [b] int32
    positions: Tensor  # [s] int64: how many tokens of its sequence lie before each new one
    decode: bool
    policy: str

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, scale: float) -> Tensor:
        into = (self.k_pages[layer], self.v_pages[layer], self.slot_mapping)
        q, k, *pages = rope_kv_write(q, k, v, *rotary, *into)
        if self.decode:
            return decode_attention(q, *pages, self.block_table, self.history + 1, scale, self.policy)
        if self.policy == "invariant":
            k, v = (as_cached(x, held) for x, held in zip((k, v), pages))
        past = (self.block_table, self.query_start, self.history)
        return prefill_attention(q, k, v, *pages, *past, scale, self.policy)


class Uncached:
    """A ragged batch without a past, of which nothing is kept: sequences of the given lengths."""

    decode = False

    def __init__(self, lengths: Sequence[int], device: torch.device, policy: str = "fast"):
        self.policy = policy
        self.query_start = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.history = torch.zeros(len(lengths), dtype=torch.int32, device=device)
        self.block_table = torch.zeros(len(lengths), 1, dtype=torch.int32, device=device)
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, scale: float) -> Tensor:
        pages = k.new_empty(1, PAGE_SIZE, *k.shape[1:])
        past = (self.block_table, self.query_start, self.history)
        return prefill_attention(rope(q, *rotary), rope(k, *rotary), v, pages, pages, *past, scale, self.policy)


class Watched:
    """Another cache, whose attention weights are kept too: for each layer, [h, t, t] for each sequence."""

    def __init__(self, inner: Step | Uncached):
        if inner.history.any():
            raise ValueError("output_attentions needs the whole sequence in one pass, but part of it is cached already")
        self.inner = inner
        self.policy = inner.policy
        self.layers: list[list[Tensor]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, scale: float) -> Tensor:
        rows = self.inner.query_start.diff().tolist()
        self.layers.append(
            [
                weights(qi, ki, scale, causal(len(qi), len(ki), q.device)).flatten(0, 1).to(q.dtype)
                for qi, ki in zip(rope(q, *rotary).split(rows), rope(k, *rotary).split(rows))
            ]
        )
        return self.inner.attend(layer, q, k, v, rotary, scale)


class PagedCache:
    """Keys and values of many sequences in pages of `page_size` tokens, for all layers of a model.

    `table` says which page is whose. This object is changed in place by whatever runs a model on it, which holds `lock`
    meanwhile: threads take turns. What it knows of one model (see `PageTable.publish`) is wrong for another, and after
    that model's parameters change.

    dtype: of the model; kv_dtype: what keys and values are kept in, one of `KV_DTYPES`, by default the same; policy: of
    attention, "fast" or "invariant" (see `ops.attention`); limit: how many pages the pool may grow to, None for no
    limit. Errors: ValueError for other names.
    """

    def __init__(
        self,
        cfg: LlamaConfig,
        pages: int,
        *,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype = torch.float16,
        kv_dtype: str | None = None,
        policy: str = "fast",
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ):
        if kv_dtype not in (None, *KV_DTYPES):
            raise ValueError(f"kv_dtype is {kv_dtype!r}; there are: {', '.join(KV_DTYPES)}")
        check_policy("PagedCache", policy)
        self.policy = policy
        self.settings = {"page_size": page_size, "kv_dtype": kv_dtype, "policy": policy}
        self.limit = limit
        self.parameters: object = None  # `models.params.written` of those the tokens were run with, where it is known
        self.lock = Lock()
        self.table = PageTable(pages, page_size)
        shape = (cfg.num_hidden_layers, pages, page_size, cfg.num_key_value_heads, cfg.head_dim)
        kind = dtype if kv_dtype is None else getattr(torch, kv_dtype) if "float" in kv_dtype else kv_dtype
        with lasting():
            self.k_pages, self.v_pages = (empty_pages(shape, kind, device) for _ in range(2))  # [layers, p, l, g, d]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All that the pages are made of, [layers, p, l, ...] each."""
        return [*leaves(self.k_pages), *leaves(self.v_pages)]

    def check(self, cfg: LlamaConfig, device: torch.device) -> None:
        """Errors: ValueError unless the pages are of the shape and on the device of such a model."""
        layers, _, _, heads, width = self.k_pages.shape
        held, wanted = (
            f"{layers} layers of {heads} key heads of {width} numbers on {device}"
            for layers, heads, width, device in (
                (layers, heads, width, self.k_pages.device),
                (cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim, device),
            )
        )
        if held != wanted:
            raise ValueError(f"the cache is of {held}, but the model has {wanted}")

    def length(self, seq: int) -> int:
        return self.table[seq].length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence, under the name Hugging Face's caches have for it."""
        return max((s.length for s in self.table.sequences.values()), default=0)

    def reserve(self, counts: Mapping[int, int]) -> None:
        """Enlarge the pool, if need be, so that so many tokens can be appended to each sequence; no page moves.

        Idle pages are given away before the pool grows; for more of them to stay, make it larger from the start.
        Errors: `OutOfPages` beyond its limit.
        """
        self.grow(self.table.missing(counts))

    def admit(self, known: Mapping[int, list[int]], new: int) -> None:
        """`PageTable.admit`, with a pool that grows as it must. Errors: `OutOfPages` beyond its limit; nothing has
        changed then.
        """
        if missing := self.table.admit(known, new):
            self.grow(missing)
            self.table.admit(known, new)

    def grow(self, pages: int) -> None:
        """Add that many free pages. Errors: `OutOfPages` beyond the limit."""
        total = self.table.pages + pages
        if self.limit is not None and pages and total > self.limit:
            raise OutOfPages(
                f"{total} pages of {self.table.page_size} tokens are needed for this and for what was promised to "
                f"others, but the limit is {self.limit} ({len(self.table.sequences)} sequences hold "
                f"{self.table.pages - self.table.available})"
            )

        def larger(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_empty(x.shape[0], pages, *x.shape[2:])), dim=1)  # [layers, p', ...]

        if pages:
            with lasting():
                self.k_pages, self.v_pages = mapped(larger, self.k_pages), mapped(larger, self.v_pages)
            self.table.grow(pages)

    @contextmanager
    def at(self, lengths: Sequence[int], keep: bool) -> Iterator[list[int]]:
        """All sequences, rolled back to these lengths, as they also are if the `with` fails.

        Unless `keep`, they are forks, gone after it. Errors: ValueError for other lengths than they can have, before
        anything is changed.
        """
        sequences = list(self.table.sequences)
        held = [self.length(seq) for seq in sequences]
        if len(lengths) != len(held) or any(not 0 <= to <= n for to, n in zip(lengths, held)):
            raise ValueError(f"sequences of {held} tokens cannot be rolled back to {list(lengths)}")
        forks: list[int] = []
        try:
            for seq in [] if keep else sequences:
                forks.append(self.table.fork(seq))
            sequences = sequences if keep else forks
            for seq, length in zip(sequences, lengths, strict=True):
                self.table.truncate(seq, length)
            yield sequences
        except BaseException:
            for seq, length in zip(sequences, lengths) if keep else ():
                self.table.truncate(seq, min(length, self.length(seq)))
            raise
        finally:
            for seq in forks:
                self.table.free(seq)

    @contextmanager
    def step(self, counts: Mapping[int, int]) -> Iterator[Step]:
        """Append so many tokens to each sequence; if the `with` fails, every sequence is as it was before it.

        Errors: `OutOfPages`, before anything is changed.
        """
        before = {seq: self.length(seq) for seq in counts}
        grant = self.table.append(counts)
        try:
            self._copy(grant.copies)
            yield self._view(before, counts, grant.slots)
        except BaseException:
            for seq, length in before.items():
                self.table.truncate(seq, length)
            self._copy(grant.copies)  # sequences keep the pages they were given, and the first time may be cut short
            raise

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            for x in self.tensors:
                x[:, target] = x[:, source]

    def _view(self, before: Mapping[int, int], counts: Mapping[int, int], slots: list[int]) -> Step:
        device = self.k_pages.device
        tables = [self.table[seq].pages for seq in counts]
        width = max(1, *map(len, tables)) if tables else 1
        new = list(counts.values())
        return Step(
            self.k_pages,
            self.v_pages,
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32, device=device),
            torch.tensor([0, *new], device=device).cumsum(0).int(),
            torch.tensor([before[seq] for seq in counts], dtype=torch.int32, device=device),
            torch.cat([torch.arange(before[seq], before[seq] + n, device=device) for seq, n in counts.items()]),
            decode=self.policy == "fast" and all(n == 1 for n in new),
            policy=self.policy,
        )


def resume(
    own: PagedCache | None, past: PagedCache | None, start_pos: int | Sequence[int] | Tensor | None, rows: int
) -> tuple[PagedCache | None, list[int]]:
    """Which cache a call continues, `past` or at `start_pos` the model's `own`, and from which length of each row.

    None stands for a new cache. Errors: ValueError naming both numbers where they do not fit; nothing is changed.
    """
    if past is not None and start_pos is not None:
        raise ValueError("start_pos continues the model's own cache; do not give past_key_values too")
    if past is not None and not isinstance(past, PagedCache):
        raise TypeError(f"past_key_values is a {type(past).__name__}, expected the PagedCache of an earlier call")
    starts = start_pos.tolist() if isinstance(start_pos, Tensor) else start_pos
    starts = [starts or 0] * rows if starts is None or isinstance(starts, int) else list(starts)
    cache = past if past is not None else own if any(starts) else None
    lengths = [s.length for s in cache.table.sequences.values()] if cache else [0] * rows
    if len(lengths) != rows or len(starts) != rows:
        raise ValueError(f"{rows} rows of input for {len(lengths)} cached sequences and {len(starts)} of start_pos")
    if past is not None:
        return past, lengths
    for start, length in zip(starts, lengths):
        if not 0 <= start <= length:
            raise ValueError(f"start_pos is {start}, but the model's cache holds {length} tokens")
    return cache, starts
