"""Our way to round a layer: scales, clipping and rounding all judged by what the other inputs cannot make good."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vila_triton.checkpoints.int4_packing import TILE_N
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine, linear
from vila_triton.models.llama import Layer, gated
from vila_triton.models.params import tree_map
from vila_triton.ops import Int4, dequantize, rms_norm
from vila_triton.ops.int4 import LEAST

from .activations import Tokens, attended, inputs
from .awq_scales import PLACES, rescaled, search, with_norms
from .gptq import compensated, loss
from .hessian import Moments, moments, stand_in
from .quant_grid import between, clipped, extent, packed

AT_ONCE = 1 << 18  # weights rounded at a time, or a 32nd of a layer if that is more
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
    spoilt; without, from what it always had. The work is done in the dtype of x, whatever that of the layer: beside
    the layer, only linears of one place are held in it.
    """
    truth = inputs(tree_map(lambda leaf: leaf.to(x.dtype), layer), x, tokens, cfg)
    heads = (cfg.num_attention_heads, cfg.num_key_value_heads)
    report: dict[str, Any] = {"scales": {}, "linears": {}}
    scales: dict[str, Tensor] = {}
    for place, names in PLACES.items():
        found = search(
            [getattr(layer, name).weight for name in names],
            moments(getattr(truth, place), tokens.weights, group),
            group,
            heads if place == "o" else None,
        )
        scales[place] = found.scale
        truth = replace(truth, **{place: getattr(truth, place) / found.scale})
        report["scales"][place] = {"ratio": found.ratio, "duo": found.duo, "largest": float(found.scale.max())}
    norms = with_norms(layer, scales)
    made = norms
    weights = [getattr(layer, name).weight.numel() for names in PLACES.values() for name in names]
    at_once = max(AT_ONCE, sum(weights) // 32)

    def round_place(place: str, got: Tensor) -> Layer:
        """The layer as it was but for the rounded linears of the place, as numbers."""
        nonlocal made
        known, wanted, dense = moments(got, tokens.weights, group), getattr(truth, place), norms
        shift = None if got is wanted else stand_in(wanted, got, tokens.weights, known)
        for name in PLACES[place]:
            old = rescaled(layer, name, scales, cfg.num_key_value_heads)
            bias = None if old.bias is None else old.bias.to(x.dtype)
            try:
                new, report["linears"][name] = round_linear(old.weight, shift, known, group, at_once)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            del old
            made = replace(made, **{name: Affine(new, bias)})
            if propagate:
                dense = replace(dense, **{name: Affine(written_out(new, x.dtype, at_once), bias)})
        return dense

    def through(dense: Layer, h: Tensor) -> Tensor:
        return tokens.through(lambda rows, cache: attended(dense, rows, cfg, cache), h)

    if not propagate:
        for place in PLACES:
            round_place(place, getattr(truth, place))
        return Rounded(made, truth.out, truth.out, report)
    h = rms_norm(seen, norms.attention_norm, cfg.rms_norm_eps)
    a = through(round_place("attention", h), h)
    seen = seen + linear(round_place("o", a).o, a)
    m = rms_norm(seen, norms.mlp_norm, cfg.rms_norm_eps)
    g = gated(round_place("mlp", m), m)
    seen = seen + linear(round_place("down", g).down, g)
    return Rounded(made, truth.out, seen, report)


def round_linear(
    w: Tensor, shift: Tensor | None, known: Moments, group: int, at_once: int
) -> tuple[Int4, dict[str, float]]:
    """A weight [n, k], after `stand_in` if there is one, some rows at a time; and what to say of it."""
    if 0 < (largest := float(w.abs().max())) < LEAST:
        raise ValueError(f"its largest weight is {largest:.3g}, which no float16 scale can tell from 0")
    parts, sums = [], torch.zeros(4, dtype=torch.float64)
    for rows in w.split(rows_of(w.shape[1], at_once)):
        target = rows if shift is None else rows @ shift
        grid = clipped(target, group, known.conditional, SHRINKS)
        found = compensated(target, grid, known.order, known.upper)
        low, high = extent(rows, group)
        plain = between(low, high).spread(w.shape[1])
        ours = loss(grid.spread(w.shape[1]).value(found) - target, known.second)
        nearest = loss(plain.value(plain.snap(rows)) - rows, known.second)
        low, high = extent(target, group)
        shrink = 15 * grid.scales / (high - low).clamp(min=15 * LEAST)
        size = loss(rows, known.second)
        sums += torch.stack([x.double().sum().cpu() for x in (nearest, ours, size, shrink)])
        parts.append(packed(found, grid, torch.float16))
    whole = Int4(
        torch.cat([x.qweight for x in parts]),
        torch.cat([x.scales for x in parts], 1),
        torch.cat([x.zeros for x in parts], 1),
        group,
    )
    nearest, ours, size, shrink = sums.tolist()
    said = {"nearest": nearest / size, "ours": ours / size} if size else {"nearest": 0.0, "ours": 0.0}
    return whole, said | {"shrink": shrink / whole.scales.numel()}


def rows_of(k: int, at_once: int) -> int:
    """Rows [k] of a weight that are worked on together: whole tiles."""
    return max(1, at_once // k // TILE_N) * TILE_N


def written_out(w: Int4, dtype: torch.dtype, at_once: int) -> Tensor:
    """`dequantize`, some rows at a time."""
    (n, k), step = w.shape, rows_of(w.shape[1], at_once)
    out = torch.empty(n, k, dtype=dtype, device=w.scales.device)
    for i in range(0, n, step):
        tiles, rows = slice(i // TILE_N, (i + step) // TILE_N), slice(i, i + step)
        some = replace(w, qweight=w.qweight[tiles], scales=w.scales[:, rows], zeros=w.zeros[:, rows])
        out[rows] = dequantize(some, dtype)
    return out
