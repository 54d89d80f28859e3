"""Calibration's tokens on their way through the model: ragged rows end to end, each token with a weight."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_triton.cache.paged_cache import UncachedBatch
from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import linear
from vila_triton.ops import rms_norm

TOKENS_PER_BATCH = 4096  # tokens run at a time; a row is never cut


@dataclass(frozen=True)
class CalibrationTokens:
    """Rows of the given lengths, s tokens in all; weights [s] float32, of mean 1, say how much each counts."""

    lengths: tuple[int, ...]
    weights: Tensor

    def batches(self) -> Iterator[tuple[slice, list[int]]]:
        """Tokens of whole rows, as many at a time as `AT_ONCE` allows, and the lengths of those rows."""
        start, batch_lengths = 0, list[int]()
        for n in (*self.lengths, None):
            if batch_lengths and (n is None or sum(batch_lengths) + n > TOKENS_PER_BATCH):
                yield slice(start, start + sum(batch_lengths)), batch_lengths
                start, batch_lengths = start + sum(batch_lengths), []
            batch_lengths = batch_lengths if n is None else [*batch_lengths, n]

    def map_batches(self, f: Callable[[Tensor, UncachedBatch], Tensor], x: Tensor) -> Tensor:
        """f of the rows [s, e] and of the cache that knows where each begins, some rows at a time: [s, ...]."""
        return torch.cat([f(x[span], UncachedBatch(lengths, x.device)) for span, lengths in self.batches()])


def attention_output(layer: llama.Layer, h: Tensor, cfg: LlamaConfig, cache: UncachedBatch) -> Tensor:
    """What `o` is given: normed rows [s, e] -> [s, h·d]."""
    return llama.attention_heads_output(layer, h, llama.rotary_cos_sin(cache.positions, cfg), 0, cfg, cache)


@dataclass(frozen=True)
class LinearInputs:
    """What the linears of a layer are given, and what leaves the layer."""

    attention: Tensor  # [s, e] of q, k, v
    o: Tensor  # [s, h·d]
    mlp: Tensor  # [s, e] of gate, up
    down: Tensor  # [s, f]
    out: Tensor  # [s, e]


def capture_linear_inputs(layer: llama.Layer, x: Tensor, tokens: CalibrationTokens, cfg: LlamaConfig) -> LinearInputs:
    """One layer over all tokens x [s, e]."""
    h = rms_norm(x, layer.attention_norm, cfg.rms_norm_eps)
    a = tokens.map_batches(lambda rows, cache: attention_output(layer, rows, cfg, cache), h)
    x = x + linear(layer.o, a)
    m = rms_norm(x, layer.mlp_norm, cfg.rms_norm_eps)
    g = llama.mlp_hidden(layer, m)
    return LinearInputs(h, a, m, g, x + linear(layer.down, g))
