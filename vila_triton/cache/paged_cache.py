"""The paged KV cache of a VILA, and the attention of one step over it (PagedAttention, Kwon et al. 2023)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vila_triton.ops import (
    KVPages,
    PagedKV,
    decode_attention,
    kv_write,
    prefill_attention,
    rope,
    rope_kv_write,
    without_context,
)
from vila_triton.ops.attention import check_numerics
from vila_triton.ops.kv_pages import quantize_kv

from ..lock import DeferringLock
from ..models.config import LlamaConfig
from ..models.llama import CosSin
from ..models.params import tree_map
from ..registry.gradients import without_gradient
from .page_allocator import OutOfPages
from .paged_tensors import DEFAULT_PAGE_SIZE, PagedCache, PagedStep, outside_inference_mode

NO_GRADIENT = (
    "keys and values that are read from the KV cache have no gradient; run whole sequences in one pass, with "
    "use_cache=False and without batch_invariant numerics"
)
KV_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")


def step_phase(new_lens: Iterable[int], numerics: str) -> str:
    """The phase of a step with so many new tokens of each sequence, which decides the kernels that run in it.

    "batch_invariant" with these numerics, else "decode" if every sequence has one new token, else "prefill".
    """
    if numerics == "batch_invariant":
        return "batch_invariant"
    return "decode" if all(n == 1 for n in new_lens) else "prefill"


def round_like_pages(x: Tensor, pages: KVPages) -> Tensor:
    """Round new keys or values [s, g, d] to the values that will be read back from the pages."""
    encoded = quantize_kv(x, pages)
    return (encoded if isinstance(encoded, Tensor) else encoded.dequantize()).to(x.dtype)


def uncached_attention(q: Tensor, k: Tensor, v: Tensor, query_start_loc: Tensor, scale: float, numerics: str) -> Tensor:
    """Causal attention of whole sequences, laid end to end, to themselves: q [s, h, d], k and v [s, g, d] -> [s, h, d].

    There are no pages to read, so it has a gradient. A v that is a part of q, k and v as one product is copied, or the
    backward pass would keep all of these.
    """
    return prefill_attention(q, k, v.contiguous(), *without_context(k, query_start_loc), scale, numerics)


@dataclass(frozen=True)
class PagedBatch(PagedStep):
    """A step of a VILA.

    `attend` rotates q and k, writes k and v into the pages in place, and returns the attention output. A step in which
    every sequence has one new token is a decode step, which has kernels of its own. With numerics "batch_invariant" no
    step is, since decode kernels sum in another order; and new keys and values are first rounded to the pages' format,
    as later steps will read them. So the result does not depend on where chunks end, nor on what was prompt and what
    was generated.
    """

    numerics: str
    phase: str  # see `step_phase`
    is_differentiable: bool  # attention sees only the new keys and values, and sees them as they were computed
    detached_layers: set[int]  # the cache's own, see `PagedKVCache`

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        """See `models.llama.AttentionBackend`. Asking for a gradient that would leave out what is cached raises
        RuntimeError.
        """
        reads_detached = not self.is_differentiable and layer in self.detached_layers
        if not (torch.is_grad_enabled() and (reads_detached or any(x.requires_grad for x in (q, k, v)))):
            return self._attend(layer, q, k, v, rotary, scale)
        if k.requires_grad or v.requires_grad:
            self.detached_layers.add(layer)
        if not self.is_differentiable:
            out = self._attend(layer, q.detach(), k.detach(), v.detach(), rotary, scale)
            return without_gradient(out, NO_GRADIENT, q, k, v)
        q, k = rope(q, *rotary), rope(k, *rotary)
        k_pages, v_pages = self.k_pages[layer], self.v_pages[layer]
        kv_write(k.detach(), v.detach(), k_pages, v_pages, self.slot_mapping)
        k, v = self.as_attended(k, k_pages), self.as_attended(v, v_pages)
        return uncached_attention(q, k, v, self.query_start_loc, scale, self.numerics)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        destination = (self.k_pages[layer], self.v_pages[layer], self.slot_mapping)
        q, k, k_pages, v_pages = rope_kv_write(q, k, v, *rotary, *destination)
        cache = PagedKV(k_pages, v_pages, self.block_table)
        if self.phase == "decode":
            return decode_attention(q, cache, self.seq_lens, scale, self.numerics)
        k, v = self.as_attended(k, k_pages), self.as_attended(v, v_pages)
        return prefill_attention(q, k, v, cache, self.batch, scale, self.numerics)

    def as_attended(self, x: Tensor, pages: KVPages) -> Tensor:
        """New keys or values [s, g, d] as the attention of this step takes them, if it is no decode step."""
        return round_like_pages(x, pages) if self.numerics == "batch_invariant" else x


class UncachedBatch:
    """A ragged batch of whole sequences whose keys and values are not kept."""

    def __init__(self, seq_lens: Sequence[int], device: torch.device, numerics: str = "fast"):
        self.numerics = numerics
        self.phase = "batch_invariant" if numerics == "batch_invariant" else "prefill"
        self.query_start_loc = torch.tensor([0, *seq_lens], device=device).cumsum(0).int()
        self.context_lens = torch.zeros(len(seq_lens), dtype=torch.int32, device=device)
        self.positions = torch.cat([torch.arange(n, device=device) for n in seq_lens])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        """See `models.llama.AttentionBackend`; layer is ignored."""
        return uncached_attention(rope(q, *rotary), rope(k, *rotary), v, self.query_start_loc, scale, self.numerics)


class PagedKVCache(PagedCache):
    """The cache of a VILA's language model. It grows.

    The object is changed in place by whoever runs a model on it, who must hold
    `lock` meanwhile. Registered prefixes are only valid for one model, and until its parameters change.

    dtype: of the model. kv_dtype: of stored keys and values, one of `KV_DTYPES`, by default the model's. numerics: of
    attention, "fast" or "batch_invariant" (see `ops.attention`). max_pages: the size to which the pool may grow, None
    for no limit. Errors: ValueError for other names.
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
        check_numerics("PagedKVCache", numerics)
        self.numerics = numerics
        self.settings = {"page_size": page_size, "kv_dtype": kv_dtype, "numerics": numerics}
        self.max_pages = max_pages
        self.parameter_versions: object = None  # of the model that the tokens were run with, if known
        self.detached_layers: set[int] = set()  # of which keys or values had a gradient when they were written
        self.decode_steps: Any = None  # the engine's `DecodeSteps` over these pages, until the pool grows
        self.lock = DeferringLock()
        super().__init__(
            num_pages,
            num_layers=cfg.num_hidden_layers,
            num_kv_heads=cfg.num_key_value_heads,
            head_dim=cfg.head_dim,
            page_size=page_size,
            dtype=dtype if kv_dtype is None else getattr(torch, kv_dtype) if "float" in kv_dtype else kv_dtype,
            device=device,
        )

    def check_model(self, cfg: LlamaConfig, device: torch.device) -> None:
        """Errors: ValueError if the pages have another shape or device than such a model needs."""
        layers, _, _, heads, width = self.k_pages.shape
        cached, required = (
            f"{layers} layers of {heads} KV heads of {width} numbers on {device}"
            for layers, heads, width, device in (
                (layers, heads, width, self.k_pages.device),
                (cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim, device),
            )
        )
        if cached != required:
            raise ValueError(f"the cache is of {cached}, but the model has {required}")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence, under the name of Hugging Face's caches."""
        return max((s.length for s in self.allocator.sequences.values()), default=0)

    def ensure_capacity(self, counts: Mapping[int, int]) -> None:
        """Grow the pool, if need be, so that so many tokens can be appended to each sequence; no page moves.

        Evictable pages are used before the pool grows. Errors: `OutOfPages` beyond its limit.
        """
        self.add_pages(self.allocator.num_pages_missing(counts))

    def admit(self, keys: Mapping[int, list[int]], max_new_tokens: int) -> None:
        """`PageAllocator.admit` with a pool that grows as needed. Errors: `OutOfPages` beyond its limit; nothing has
        changed then.
        """
        if missing := self.allocator.admit(keys, max_new_tokens):
            self.add_pages(missing)
            self.allocator.admit(keys, max_new_tokens)

    def add_pages(self, num_pages: int) -> None:
        """Add free pages. Errors: `OutOfPages` beyond the limit."""
        total = self.allocator.num_pages + num_pages
        if self.max_pages is not None and num_pages and total > self.max_pages:
            raise OutOfPages(
                f"{total} pages of {self.allocator.page_size} tokens are needed for this and for what is reserved for "
                f"others, but the limit is {self.max_pages} ({len(self.allocator.sequences)} sequences hold "
                f"{self.allocator.num_pages - self.allocator.num_available_pages})"
            )

        def enlarge(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_empty(x.shape[0], num_pages, *x.shape[2:])), dim=1)  # [layers, p', ...]

        if num_pages:
            with outside_inference_mode():
                self.k_pages, self.v_pages = tree_map(enlarge, self.k_pages), tree_map(enlarge, self.v_pages)
            self.decode_steps = None
            self.allocator.add_pages(num_pages)

    @contextmanager
    def roll_back(self, context_lens: Sequence[int], *, in_place: bool) -> Iterator[list[int]]:
        """Roll all sequences back to these context lengths, and yield their ids; if the `with` fails, they stay rolled
        back.

        Unless `in_place`, the sequences are forks that are freed afterwards. Errors: ValueError for lengths that they
        cannot have, before anything is changed.
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
        """`PagedCache.append_step`, of which attention is that of the model."""
        reads_context = any(self.length(seq) for seq in counts)
        with super().append_step(counts) as step:
            phase = step_phase(counts.values(), self.numerics)
            rounds = self.numerics == "batch_invariant" and not isinstance(self.k_pages, Tensor)
            yield PagedBatch(
                **vars(step),
                numerics=self.numerics,
                phase=phase,
                is_differentiable=phase != "decode" and not rounds and not reads_context,
                detached_layers=self.detached_layers,
            )

    def decode_batch(self, block_table: Tensor, context_lens: Tensor, is_live: Tensor) -> PagedBatch:
        """The batch of one new token of each row whose place is found on the device, from what lies there.

        block_table [b, pages] int32; context_lens [b] int64, the position of the new token; is_live [b] bool: a row
        that is not keeps nothing in the cache, and attends to nothing that is there.
        """
        page_size = self.allocator.page_size
        context_lens = context_lens.masked_fill(~is_live, 0)
        page = block_table.gather(1, (context_lens // page_size)[:, None])[:, 0]  # [b]
        slots = page.long() * page_size + context_lens % page_size
        return PagedBatch(
            self.k_pages,
            self.v_pages,
            slots.masked_fill(~is_live, -1),
            block_table,
            torch.arange(len(block_table) + 1, dtype=torch.int32, device=block_table.device),
            context_lens.int(),
            (context_lens + is_live).int(),
            context_lens,
            self.numerics,
            step_phase([1], self.numerics),
            is_differentiable=False,
            detached_layers=self.detached_layers,
        )


def resolve_past(
    own_cache: PagedKVCache | None,
    past: PagedKVCache | None,
    start_pos: int | Sequence[int] | Tensor | None,
    num_rows: int,
) -> tuple[PagedKVCache | None, list[int]]:
    """Choose the cache that a call continues: `past`, or at `start_pos` the model's own -> cache or None for a new one,
    and the context length of each row.

    Errors: ValueError naming both numbers where they do not fit; nothing is changed.
    """
    if past is not None and start_pos is not None:
        raise ValueError("start_pos continues the model's own cache; do not give past_key_values too")
    if past is not None and not isinstance(past, PagedKVCache):
        raise TypeError(f"past_key_values is a {type(past).__name__}, expected the PagedKVCache of an earlier call")
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
