"""Our way to round a layer: scales, clipping and rounding all judged by what the other inputs cannot make good."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine, linear
from vila_triton.models.llama import Layer, gated
from vila_triton.ops import Int4, dequantize, rms_norm

from .compensate import compensated, loss
from .grid import SMALLEST, Grid, between, clipped, extent, packed
from .moments import Moments, moments, stand_in
from .scales import PLACES, scaled, search
from .tokens import Tokens, attended, inputs

SHRINKS = tuple(1 - i / 20 for i in range(6))


@dataclass(frozen=True)
class Rounded:
    """A layer in int4, what leaves it, and what its report says."""

    layer: Layer
    truth: Tensor  # [s, e] out of the layer as it was
    seen: Tensor  # [s, e] out of the rounded one
    report: dict[str, Any]


def quantize_layer(
    layer: Layer, x: Tensor, seen: Tensor, tokens: Tokens, cfg: LlamaConfig, group: int, propagate: bool = True
) -> Rounded:
    """Round the linears of a layer; x [s, e] are its inputs, `seen` those it gets from the rounded layers before.

    With `propagate` a linear learns from the inputs that the rounded ones before it give, and makes good what they
    spoilt; without, from what it always had.
    """
    truth = inputs(layer, x, tokens, cfg)
    heads = (cfg.num_attention_heads, cfg.num_key_value_heads)
    report: dict[str, Any] = {"scales": {}, "linears": {}}
    for place, names in PLACES.items():
        found = search(
            [getattr(layer, name).weight for name in names],
            moments(getattr(truth, place), tokens.weights, group),
            group,
            heads if place == "o" else None,
        )
        layer = scaled(layer, place, found.scale, cfg.num_key_value_heads)
        truth = replace(truth, **{place: getattr(truth, place) / found.scale})
        report["scales"][place] = {"ratio": found.ratio, "duo": found.duo, "largest": float(found.scale.max())}
    dense, packed_layer = layer, layer

    def round_place(place: str, got: Tensor) -> None:
        nonlocal dense, packed_layer
        known, wanted = moments(got, tokens.weights, group), getattr(truth, place)
        weights = [getattr(layer, name).weight for name in PLACES[place]]
        shift = None if got is wanted else stand_in(wanted, got, tokens.weights, known)
        for name, new, said in zip(PLACES[place], *round_together(weights, shift, known, group)):
            bias = getattr(layer, name).bias
            report["linears"][name] = said
            packed_layer = replace(packed_layer, **{name: Affine(new, bias)})
            dense = replace(dense, **{name: Affine(dequantize(new, x.dtype), bias)})

    if not propagate:
        for place in PLACES:
            round_place(place, getattr(truth, place))
        return Rounded(packed_layer, truth.out, truth.out, report)
    h = rms_norm(seen, layer.attention_norm, cfg.rms_norm_eps)
    round_place("attention", h)
    a = tokens.through(lambda rows, cache: attended(dense, rows, cfg, cache), h)
    round_place("o", a)
    seen = seen + linear(dense.o, a)
    m = rms_norm(seen, layer.mlp_norm, cfg.rms_norm_eps)
    round_place("mlp", m)
    g = gated(dense, m)
    round_place("down", g)
    return Rounded(packed_layer, truth.out, seen + linear(dense.down, g), report)


def round_together(
    weights: list[Tensor], shift: Tensor | None, known: Moments, group: int
) -> tuple[list[Int4], list[dict[str, float]]]:
    """Linears that share their inputs, [n, k] each, after `stand_in` if there is one; and what to say of each."""
    w = torch.cat(weights)
    target = w if shift is None else w @ shift
    grid = clipped(target, group, known.conditional, SHRINKS)
    codes = compensated(target, grid, known.inverse)
    plain = between(*extent(w, group)).spread(w.shape[1])
    size = loss(w, known.second)
    nearest = loss(plain.value(plain.snap(w)) - w, known.second)
    ours = loss(grid.spread(w.shape[1]).value(codes) - target, known.second)
    low, high = extent(target, group)
    shrink = 15 * grid.scales / (high - low).clamp(min=15 * SMALLEST)
    sizes, made, said, at = [len(x) for x in weights], [], [], 0
    for n in sizes:
        rows = slice(at, at + n)
        at += n
        made.append(packed(codes[rows], Grid(grid.scales[rows], grid.zeros[rows]), torch.float16))
        total = float(size[rows].sum().clamp(min=1e-30))
        said.append(
            {
                "nearest": float(nearest[rows].sum()) / total,
                "ours": float(ours[rows].sum()) / total,
                "shrink": float(shrink[rows].mean()),
            }
        )
    return made, said
