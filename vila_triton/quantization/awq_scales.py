"""Which inputs to make louder before rounding, and quieter in what they come from, so that nothing else changes.

Four places of a layer allow it (Lin et al. 2023, AWQ): s divides the norm's weight or the rows of the linear before,
and multiplies the columns of the linears after.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from vila_triton.models.layers import Affine
from vila_triton.models.llama import Layer

from .hessian import Moments
from .quant_grid import between, block_loss, extent

RATIOS = tuple(i / 10 for i in range(10))
ROWS = 512  # of a linear, evenly spaced, that scales are searched on
PLACES = {"attention": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class Choice:
    """The scale of a place, [k], and how it was made: E|x|^ratio, over weights^(1 - ratio) if `duo`."""

    scale: Tensor
    ratio: float
    duo: bool


def spread(s: Tensor) -> Tensor:
    """A scale whose least and greatest lie alike around 1."""
    s = s.clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def shared(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """[h·d] -> [h·d], equal for the query heads that share a value head, as their inputs come from the same rows."""
    x = rearrange(x, "(g r d) -> g r d", g=kv_heads, r=heads // kv_heads)
    return x.mean(1, keepdim=True).expand_as(x).flatten()


def candidates(mean_abs: Tensor, weights: list[Tensor]) -> list[Choice]:
    """All that is tried; the first changes nothing."""
    size = torch.cat([w.abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-12) for w in weights]).mean(0)
    plain = [Choice(spread(mean_abs.clamp(min=1e-6) ** r), r, False) for r in RATIOS]
    duo = [Choice(spread(mean_abs.clamp(min=1e-6) ** r / (size ** (1 - r) + 1e-4)), r, True) for r in RATIOS]
    return plain + duo


def search(weights: list[Tensor], seen: Moments, group: int, heads: tuple[int, int] | None = None) -> Choice:
    """The scale after which rounding to the nearest level loses least of what cannot be made good elsewhere.

    weights: of the linears that share the inputs, [n, k] each; every linear's loss counts by its share of what it puts
    out. heads: query and value heads, if the scale must be equal for those that share.
    """
    mean_abs = seen.mean_abs if heads is None else shared(seen.mean_abs, *heads)
    weights = [w[:: -(-len(w) // ROWS)].to(seen.second.dtype) for w in weights]
    sizes = [((w @ seen.second) * w).sum().clamp(min=torch.finfo(w.dtype).tiny) for w in weights]

    def loss(choice: Choice) -> float:
        s = choice.scale.view(len(seen.conditional), group)
        blocks, total = seen.conditional / (s[:, :, None] * s[:, None]), torch.zeros(())
        for w, size in zip(weights, sizes):
            for some in w.split(64):
                scaled = some * choice.scale
                grid = between(*extent(scaled, group)).spread(w.shape[1])
                total = total + block_loss(grid.value(grid.snap(scaled)) - scaled, blocks).sum() / size
        return float(total)

    tried = candidates(mean_abs, weights)
    if heads is not None:
        tried = [replace(choice, scale=spread(shared(choice.scale, *heads))) for choice in tried]
    return min(tried, key=loss)


def columns(linear: Affine, s: Tensor) -> Affine:
    return Affine(linear.weight * s, linear.bias)


def rows(linear: Affine, s: Tensor) -> Affine:
    return Affine(linear.weight / s[:, None], None if linear.bias is None else linear.bias / s)


def with_norms(layer: Layer, scales: Mapping[str, Tensor]) -> Layer:
    """The layer with the scales of its places taken out of its norms."""
    norms = {"attention": "attention_norm", "mlp": "mlp_norm"}
    return replace(layer, **{n: getattr(layer, n) / scales[place] for place, n in norms.items() if place in scales})


def rescaled(layer: Layer, name: str, scales: Mapping[str, Tensor], kv_heads: int) -> Affine:
    """One linear with the scale of its place on its columns, and with that of the place behind it out of its rows, one
    after the other as the scales are listed.
    """
    linear = getattr(layer, name)
    for place, s in scales.items():
        if name in PLACES[place]:
            linear = columns(linear, s)
        elif (name, place) == ("up", "down"):
            linear = rows(linear, s)
        elif (name, place) == ("v", "o"):
            d = linear.weight.shape[0] // kv_heads
            linear = rows(linear, rearrange(s, "(g r d) -> g r d", g=kv_heads, d=d)[:, 0].flatten())  # [g·d]
    return linear


def scaled(layer: Layer, scales: Mapping[str, Tensor], kv_heads: int) -> Layer:
    """The same layer, computing the same, with a scale [k] at some of its places."""
    linears = {name: rescaled(layer, name, scales, kv_heads) for names in PLACES.values() for name in names}
    return replace(with_norms(layer, scales), **linears)
