"""The paged KV cache as tensors, and what attention sees of it during one step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_triton.models.config import LlamaConfig
from vila_triton.ops import (
    KVPages,
    PagedKV,
    RaggedBatch,
    decode_attention,
    empty_kv_pages,
    page_tensors,
    prefill_attention,
    rope,
    rope_kv_write,
)
from vila_triton.ops.attention import attention_weights, causal_mask, check_numerics
from vila_triton.ops.kv_pages import quantize_kv

from ..lock import DeferringLock
from .page_allocator import OutOfPages, PageAllocator

DEFAULT_PAGE_SIZE = 16
CosSin = tuple[Tensor, Tensor]  # as in `models.llama`
KV_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors made inside can be used and written anywhere later, though `torch.inference_mode` is around it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def map_pages(fn: Callable[[Tensor], Tensor], pages: KVPages) -> KVPages:
    """Pages with fn applied to the tensors they are made of."""
    return fn(pages) if isinstance(pages, Tensor) else pages.map(fn)


def round_like_pages(x: Tensor, pages: KVPages) -> Tensor:
    """New keys or values [s, g, d] as they will be read from these pages."""
    encoded = quantize_kv(x, pages)
    return (encoded if isinstance(encoded, Tensor) else encoded.dequantize()).to(x.dtype)


@dataclass(frozen=True)
class PagedBatch:
    """One step of a ragged batch: where its s new tokens go, and what their b sequences hold before them.

    A step of one token a sequence is a decode step. `attend` writes the pages in place. Under the "invariant" policy no
    step is, as decode kernels add up in another order; and a chunk sees its own keys and values as later ones will. So
    it does not matter where chunks end, nor what was prompt and what answer.
    """

    k_pages: KVPages  # [layers, p, l, g, d]
    v_pages: KVPages  # [layers, p, l, g, d]
    slot_mapping: Tensor  # [s] int64
    block_table: Tensor  # [b, pages] int32
    query_start_loc: Tensor  # [b+1] int32
    context_lens: Tensor  # [b] int32
    positions: Tensor  # [s] int64: how many tokens of its sequence lie before each new one
    decode: bool
    numerics: str

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        destination = (self.k_pages[layer], self.v_pages[layer], self.slot_mapping)
        q, k, k_pages, v_pages = rope_kv_write(q, k, v, *rotary, *destination)
        cache = PagedKV(k_pages, v_pages, self.block_table)
        if self.decode:
            return decode_attention(q, cache, self.context_lens + 1, scale, self.numerics)
        if self.numerics == "invariant":
            k, v = round_like_pages(k, k_pages), round_like_pages(v, v_pages)
        batch = RaggedBatch(self.query_start_loc, self.context_lens)
        return prefill_attention(q, k, v, cache, batch, scale, self.numerics)


class UncachedBatch:
    """A ragged batch without a past, of which nothing is kept: sequences of the given lengths."""

    decode = False

    def __init__(self, seq_lens: Sequence[int], device: torch.device, numerics: str = "fast"):
        self.numerics = numerics
        self.query_start_loc = torch.tensor([0, *seq_lens], device=device).cumsum(0).int()
        self.context_lens = torch.zeros(len(seq_lens), dtype=torch.int32, device=device)
        self.block_table = torch.zeros(len(seq_lens), 1, dtype=torch.int32, device=device)
        self.positions = torch.cat([torch.arange(n, device=device) for n in seq_lens])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        pages = k.new_empty(1, DEFAULT_PAGE_SIZE, *k.shape[1:])
        cache = PagedKV(pages, pages, self.block_table)
        batch = RaggedBatch(self.query_start_loc, self.context_lens)
        return prefill_attention(rope(q, *rotary), rope(k, *rotary), v, cache, batch, scale, self.numerics)


class AttentionRecorder:
    """Another cache, whose attention weights are kept too: for each layer, [h, t, t] for each sequence."""

    def __init__(self, backend: PagedBatch | UncachedBatch):
        if backend.context_lens.any():
            raise ValueError("output_attentions needs the whole sequence in one pass, but part of it is cached already")
        self.backend = backend
        self.numerics = backend.numerics
        self.attentions: list[list[Tensor]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        seq_lens = self.backend.query_start_loc.diff().tolist()
        self.attentions.append(
            [
                attention_weights(qi, ki, scale, causal_mask(len(qi), len(ki), q.device)).flatten(0, 1).to(q.dtype)
                for qi, ki in zip(rope(q, *rotary).split(seq_lens), rope(k, *rotary).split(seq_lens))
            ]
        )
        return self.backend.attend(layer, q, k, v, rotary, scale)


class PagedKVCache:
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
        num_pages: int,
        *,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: torch.dtype = torch.float16,
        kv_dtype: str | None = None,
        numerics: str = "fast",
        device: torch.device | str = "cpu",
        max_pages: int | None = None,
    ):
        if kv_dtype not in (None, *KV_DTYPES):
            raise ValueError(f"kv_dtype is {kv_dtype!r}; there are: {', '.join(KV_DTYPES)}")
        check_numerics("PagedCache", numerics)
        self.numerics = numerics
        self.settings = {"page_size": page_size, "kv_dtype": kv_dtype, "numerics": numerics}
        self.max_pages = max_pages
        self.parameter_versions: object = (
            None  # `models.params.written` of those the tokens were run with, where it is known
        )
        self.lock = DeferringLock()
        self.allocator = PageAllocator(num_pages, page_size)
        shape = (cfg.num_hidden_layers, num_pages, page_size, cfg.num_key_value_heads, cfg.head_dim)
        page_dtype = dtype if kv_dtype is None else getattr(torch, kv_dtype) if "float" in kv_dtype else kv_dtype
        with outside_inference_mode():
            self.k_pages, self.v_pages = (
                empty_kv_pages(shape, page_dtype, device) for _ in range(2)
            )  # [layers, p, l, g, d]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All that the pages are made of, [layers, p, l, ...] each."""
        return [*page_tensors(self.k_pages), *page_tensors(self.v_pages)]

    def check_model(self, cfg: LlamaConfig, device: torch.device) -> None:
        """Errors: ValueError unless the pages are of the shape and on the device of such a model."""
        layers, _, _, heads, width = self.k_pages.shape
        cached, required = (
            f"{layers} layers of {heads} key heads of {width} numbers on {device}"
            for layers, heads, width, device in (
                (layers, heads, width, self.k_pages.device),
                (cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim, device),
            )
        )
        if cached != required:
            raise ValueError(f"the cache is of {cached}, but the model has {required}")

    def length(self, seq: int) -> int:
        return self.allocator[seq].length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence, under the name Hugging Face's caches have for it."""
        return max((s.length for s in self.allocator.sequences.values()), default=0)

    def ensure_capacity(self, counts: Mapping[int, int]) -> None:
        """Enlarge the pool, if need be, so that so many tokens can be appended to each sequence; no page moves.

        Idle pages are given away before the pool grows; for more of them to stay, make it larger from the start.
        Errors: `OutOfPages` beyond its limit.
        """
        self.add_pages(self.allocator.num_pages_missing(counts))

    def admit(self, keys: Mapping[int, list[int]], max_new_tokens: int) -> None:
        """`PageTable.admit`, with a pool that grows as it must. Errors: `OutOfPages` beyond its limit; nothing has
        changed then.
        """
        if missing := self.allocator.admit(keys, max_new_tokens):
            self.add_pages(missing)
            self.allocator.admit(keys, max_new_tokens)

    def add_pages(self, num_pages: int) -> None:
        """Add that many free pages. Errors: `OutOfPages` beyond the limit."""
        total = self.allocator.num_pages + num_pages
        if self.max_pages is not None and num_pages and total > self.max_pages:
            raise OutOfPages(
                f"{total} pages of {self.allocator.page_size} tokens are needed for this and for what was promised to "
                f"others, but the limit is {self.max_pages} ({len(self.allocator.sequences)} sequences hold "
                f"{self.allocator.num_pages - self.allocator.num_available_pages})"
            )

        def enlarge(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_empty(x.shape[0], num_pages, *x.shape[2:])), dim=1)  # [layers, p', ...]

        if num_pages:
            with outside_inference_mode():
                self.k_pages, self.v_pages = map_pages(enlarge, self.k_pages), map_pages(enlarge, self.v_pages)
            self.allocator.add_pages(num_pages)

    @contextmanager
    def roll_back(self, context_lens: Sequence[int], in_place: bool) -> Iterator[list[int]]:
        """All sequences, rolled back to these lengths, as they also are if the `with` fails.

        Unless `keep`, they are forks, gone after it. Errors: ValueError for other lengths than they can have, before
        anything is changed.
        """
        sequences = list(self.allocator.sequences)
        current = [self.length(seq) for seq in sequences]
        if len(context_lens) != len(current) or any(not 0 <= target <= n for target, n in zip(context_lens, current)):
            raise ValueError(f"sequences of {current} tokens cannot be rolled back to {list(context_lens)}")
        forks: list[int] = []
        try:
            for seq in [] if in_place else sequences:
                forks.append(self.allocator.fork(seq))
            sequences = sequences if in_place else forks
            for seq, length in zip(sequences, context_lens, strict=True):
                self.allocator.truncate(seq, length)
            yield sequences
        except BaseException:
            for seq, length in zip(sequences, context_lens) if in_place else ():
                self.allocator.truncate(seq, min(length, self.length(seq)))
            raise
        finally:
            for seq in forks:
                self.allocator.free_sequence(seq)

    @contextmanager
    def append_step(self, counts: Mapping[int, int]) -> Iterator[PagedBatch]:
        """Append so many tokens to each sequence; if the `with` fails, every sequence is as it was before it.

        Errors: `OutOfPages`, before anything is changed.
        """
        context_lens = {seq: self.length(seq) for seq in counts}
        allocation = self.allocator.append(counts)
        try:
            self._copy_pages(allocation.copies)
            yield self._build_batch(context_lens, counts, allocation.slots)
        except BaseException:
            for seq, length in context_lens.items():
                self.allocator.truncate(seq, length)
            self._copy_pages(
                allocation.copies
            )  # sequences keep the pages they were given, and the first time may be cut short
            raise

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            for x in self.tensors:
                x[:, target] = x[:, source]

    def _build_batch(self, context_lens: Mapping[int, int], counts: Mapping[int, int], slots: list[int]) -> PagedBatch:
        device = self.k_pages.device
        page_lists = [self.allocator[seq].pages for seq in counts]
        width = max(1, *map(len, page_lists)) if page_lists else 1
        new_lens = list(counts.values())
        return PagedBatch(
            self.k_pages,
            self.v_pages,
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor([t + [0] * (width - len(t)) for t in page_lists], dtype=torch.int32, device=device),
            torch.tensor([0, *new_lens], device=device).cumsum(0).int(),
            torch.tensor([context_lens[seq] for seq in counts], dtype=torch.int32, device=device),
            torch.cat(
                [torch.arange(context_lens[seq], context_lens[seq] + n, device=device) for seq, n in counts.items()]
            ),
            decode=self.numerics == "fast" and all(n == 1 for n in new_lens),
            numerics=self.numerics,
        )


def resolve_past(
    own_cache: PagedKVCache | None,
    past: PagedKVCache | None,
    start_pos: int | Sequence[int] | Tensor | None,
    num_rows: int,
) -> tuple[PagedKVCache | None, list[int]]:
    """Which cache a call continues, `past` or at `start_pos` the model's `own`, and from which length of each row.

    None stands for a new cache. Errors: ValueError naming both numbers where they do not fit; nothing is changed.
    """
    if past is not None and start_pos is not None:
        raise ValueError("start_pos continues the model's own cache; do not give past_key_values too")
    if past is not None and not isinstance(past, PagedKVCache):
        raise TypeError(f"past_key_values is a {type(past).__name__}, expected the PagedCache of an earlier call")
    starts = start_pos.tolist() if isinstance(start_pos, Tensor) else start_pos
    starts = [starts or 0] * num_rows if starts is None or isinstance(starts, int) else list(starts)
    cache = past if past is not None else own_cache if any(starts) else None
    lengths = [s.length for s in cache.allocator.sequences.values()] if cache else [0] * num_rows
    if len(lengths) != num_rows or len(starts) != num_rows:
        raise ValueError(f"{num_rows} rows of input for {len(lengths)} cached sequences and {len(starts)} of start_pos")
    if past is not None:
        return past, lengths
    for start, length in zip(starts, lengths):
        if not 0 <= start <= length:
            raise ValueError(f"start_pos is {start}, but the model's cache holds {length} tokens")
    return cache, starts
