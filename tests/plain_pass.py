"""The plain pass: one sequence at a time, whole, without pages, chunks or a batch, with the reference of every op.

What a call with any options returns is compared with it. Where keys and values are kept in fewer bits, which tokens see
them rounded is written down for each token (`Step`), so that the plain pass sees what the pages would hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from bench.correctness.error_budget import unit_roundoff
from bench.correctness.guarded_memory import map_tensors
from vila_triton.models import llama, vila
from vila_triton.models.config import VilaConfig
from vila_triton.models.llama import CosSin
from vila_triton.ops import KVPages, empty_kv_pages, rope
from vila_triton.ops.kv_pages import quantize_kv
from vila_triton.registry import default_choices


@dataclass(frozen=True)
class Step:
    """A step of the engine in which tokens of one sequence run.

    num_tokens    of this sequence
    is_decode     the step had one token of every sequence, so it read its own keys and values from the pages
    """

    num_tokens: int
    is_decode: bool = False


def steps_of_batch(lengths: Sequence[int], chunk_size: int | None, in_pages: bool = True) -> list[list[Step]]:
    """The steps of each of these sequences, run together in chunks; in_pages: keys and values are kept."""
    size = chunk_size or max(lengths)
    steps: list[list[Step]] = [[] for _ in lengths]
    for start in range(0, max(lengths), size):
        counts = [min(size, n - start) for n in lengths]
        is_decode = in_pages and all(n <= 1 for n in counts)
        for row, n in zip(steps, counts):
            row += [Step(n, is_decode)] if n > 0 else []
    return steps


@dataclass
class PlainAttention:
    """Attention of one whole sequence as a matrix [t, t].

    as_computed   [t, t], true where a query sees a key and its value as they were computed, else as the pages hold them
    pages         pages of the format in which they are kept
    weights       is extended by the attention weights of each layer [h, t, t]
    """

    as_computed: Tensor
    pages: KVPages
    weights: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        """See `models.llama.AttentionBackend`."""
        q, k = rope.reference(q, *rotary), rope.reference(k, *rotary)
        k, v, cached_k, cached_v = (
            x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v, self.as_cached(k), self.as_cached(v))
        )  # [t, h, d]
        scores, cached_scores = (torch.einsum("shd,thd->hst", q, x) * scale for x in (k, cached_k))
        scores = torch.where(self.as_computed, scores, cached_scores)
        future = torch.ones_like(self.as_computed).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        self.weights.append(weights)
        return torch.einsum("hst,thd->shd", weights * self.as_computed, v) + torch.einsum(
            "hst,thd->shd", weights * ~self.as_computed, cached_v
        )

    def as_cached(self, x: Tensor) -> Tensor:
        """Keys or values [t, g, d] as they are read from the pages."""
        encoded = quantize_kv(x, self.pages)
        return (encoded if isinstance(encoded, Tensor) else encoded.dequantize()).to(x.dtype)


@dataclass(frozen=True)
class PlainResult:
    """The logits [t, v] of every token of a sequence, the input of each layer and the result [t, e], and the attention
    weights of each layer [h, t, t].
    """

    logits: Tensor
    hidden_states: list[Tensor]
    attentions: list[Tensor]


def embed_row(params: vila.Vila, cfg: VilaConfig, row: Sequence[int], images: Sequence[Tensor] = ()) -> Tensor:
    """The embeddings [t', e] of a row of ids, -200 for each of the images [c, H, W], which are encoded one by one."""
    left = list(images)
    with default_choices({}):
        parts = [
            vila.encode_images(params, left.pop(0)[None], cfg)[0]
            if token == vila.IMAGE_TOKEN_INDEX
            else llama.embed(params.llm, torch.tensor([token]))
            for token in row
        ]
    assert not left
    return torch.cat(parts)


def plain_pass(
    params: vila.Vila,
    cfg: VilaConfig,
    embeddings: Tensor,
    *,
    positions: Tensor | None = None,
    steps: Sequence[Step] | None = None,
    kv_dtype: str | None = None,
    numerics: str = "fast",
) -> PlainResult:
    """Run a whole sequence, embeddings [t, e] at positions [t], whose tokens ran in these steps, by default in one.

    With numerics "batch_invariant" every query sees all keys and values as the pages hold them.
    """
    length, dtype = len(embeddings), embeddings.dtype
    steps = [Step(length)] if steps is None else steps
    step_of = torch.tensor([i for i, step in enumerate(steps) for _ in range(step.num_tokens)])  # [t]
    reads_pages = torch.tensor([step.is_decode or numerics == "batch_invariant" for step in steps])[step_of]
    page_dtype = dtype if kv_dtype is None else getattr(torch, kv_dtype) if "float" in kv_dtype else kv_dtype
    pages = empty_kv_pages((0, cfg.llm.head_dim), page_dtype)
    backend = PlainAttention((step_of[:, None] == step_of) & ~reads_pages[:, None], pages)
    states: list[Tensor] = []
    with default_choices({}):
        at = torch.arange(length) if positions is None else positions
        hidden = llama.forward(params.llm, embeddings, at, cfg.llm, backend, states)
        return PlainResult(llama.logits(params.llm, hidden), states, backend.weights)


def float64_budget(params: vila.Vila, cfg: VilaConfig, rows: Sequence[Tensor]) -> float:
    """The most by which two computations in float64 may differ, in any logit, hidden state or attention weight of these
    rows [t, e]: twice the sum of their errors, each that of the plain pass in float32 times the ratio of the unit
    roundoffs.
    """
    single = map_tensors(Tensor.float, params)
    pairs = [(plain_pass(params, cfg, x), plain_pass(single, cfg, x.float())) for x in rows]
    errors = [(a - b).abs().amax() for pair in pairs for a, b in zip(*map(all_numbers, pair), strict=True)]
    return 4 * float(max(errors)) * unit_roundoff(torch.float64) / unit_roundoff(torch.float32)


def all_numbers(result: PlainResult) -> list[Tensor]:
    """The logits, hidden states and attention weights."""
    return [result.logits, *chain(result.hidden_states, result.attentions)]
