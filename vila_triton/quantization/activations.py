"""Calibration activations: all tokens of the calibration set on their way through a decoder layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_triton.cache.paged_cache import UncachedBatch
from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import linear
from vila_triton.ops import rms_norm

TOKENS_PER_BATCH = 4096  # tokens that run together; a sequence is never cut


@dataclass(frozen=True)
class CalibrationTokens:
    """A ragged batch of s tokens: the lengths of its sequences, and how much each token counts.

    weights: [s] float32, of mean 1.
    """

    lengths: tuple[int, ...]
    weights: Tensor

    def batches(self) -> Iterator[tuple[slice, list[int]]]:
        """Cut the tokens into batches of whole sequences, of at most TOKENS_PER_BATCH tokens or one sequence.

        Yields the tokens of a batch as a slice, and the lengths of its sequences.
        """
        start, batch_lengths = 0, list[int]()
        for n in (*self.lengths, None):
            if batch_lengths and (n is None or sum(batch_lengths) + n > TOKENS_PER_BATCH):
                yield slice(start, start + sum(batch_lengths)), batch_lengths
                start, batch_lengths = start + sum(batch_lengths), []
            batch_lengths = batch_lengths if n is None else [*batch_lengths, n]

    def map_batches(self, f: Callable[[Tensor, UncachedBatch], Tensor], x: Tensor) -> Tensor:
        """Apply f(rows, cache) batch by batch to x [s, e] and join the results: [s, ...]."""
        return torch.cat([f(x[span], UncachedBatch(lengths, x.device)) for span, lengths in self.batches()])


def attention_output(layer: llama.Layer, h: Tensor, cfg: LlamaConfig, cache: UncachedBatch) -> Tensor:
    """Causal self-attention without output projection: normed hidden states [s, e] -> concatenated heads [s, h·d]."""
    return llama.attention_heads_output(layer, h, llama.rotary_cos_sin(cache.positions, cfg), 0, cfg, cache)


@dataclass(frozen=True)
class LinearInputs:
    """The inputs of a decoder layer's linears, by scale group, and the output of the layer."""

    attention: Tensor  # [s, e], of q, k, v
    o: Tensor  # [s, h·d]
    mlp: Tensor  # [s, e], of gate, up
    down: Tensor  # [s, f]
    out: Tensor  # [s, e], the layer's


def capture_linear_inputs(layer: llama.Layer, x: Tensor, tokens: CalibrationTokens, cfg: LlamaConfig) -> LinearInputs:
    """Run one decoder layer over the hidden states x [s, e] of all tokens and keep the inputs of its linears."""
    h = rms_norm(x, layer.attention_norm, cfg.rms_norm_eps)
    a = tokens.map_batches(lambda rows, cache: attention_output(layer, rows, cfg, cache), h)
    x = x + linear(layer.o, a)
    m = rms_norm(x, layer.mlp_norm, cfg.rms_norm_eps)
    g = llama.mlp_hidden(layer, m)
    return LinearInputs(h, a, m, g, x + linear(layer.down, g))
