"""Calibration's tokens on their way through the model: ragged rows end to end, each token with a weight."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_triton.cache.paged_cache import Uncached
from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import linear
from vila_triton.ops import rms_norm

AT_ONCE = 4096  # tokens run at a time; a row is never cut


@dataclass(frozen=True)
class Tokens:
    """Rows of the given lengths, s tokens in all; weights [s] float32, of mean 1, say how much each counts."""

    lengths: tuple[int, ...]
    weights: Tensor

    def runs(self) -> Iterator[tuple[slice, list[int]]]:
        """Tokens of whole rows, as many at a time as `AT_ONCE` allows, and the lengths of those rows."""
        start, held = 0, list[int]()
        for n in (*self.lengths, None):
            if held and (n is None or sum(held) + n > AT_ONCE):
                yield slice(start, start + sum(held)), held
                start, held = start + sum(held), []
            held = held if n is None else [*held, n]

    def through(self, f: Callable[[Tensor, Uncached], Tensor], x: Tensor) -> Tensor:
        """f of the rows [s, e] and of the cache that knows where each begins, some rows at a time: [s, ...]."""
        return torch.cat([f(x[at], Uncached(lengths, x.device)) for at, lengths in self.runs()])


def attended(layer: llama.Layer, h: Tensor, cfg: LlamaConfig, cache: Uncached) -> Tensor:
    """What `o` is given: normed rows [s, e] -> [s, h·d]."""
    return llama.attended(layer, h, llama.angles(cache.positions, cfg), 0, cfg, cache)


@dataclass(frozen=True)
class Inputs:
    """What the linears of a layer are given, and what leaves the layer."""

    attention: Tensor  # [s, e] of q, k, v
    o: Tensor  # [s, h·d]
    mlp: Tensor  # [s, e] of gate, up
    down: Tensor  # [s, f]
    out: Tensor  # [s, e]


def inputs(layer: llama.Layer, x: Tensor, tokens: Tokens, cfg: LlamaConfig) -> Inputs:
    """One layer over all tokens x [s, e]."""
    h = rms_norm(x, layer.attention_norm, cfg.rms_norm_eps)
    a = tokens.through(lambda rows, cache: attended(layer, rows, cfg, cache), h)
    x = x + linear(layer.o, a)
    m = rms_norm(x, layer.mlp_norm, cfg.rms_norm_eps)
    g = llama.gated(layer, m)
    return Inputs(h, a, m, g, x + linear(layer.down, g))
