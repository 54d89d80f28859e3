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

from .hessian import HessianInfo
from .quant_grid import grid_from_range, group_hessian_loss, group_min_max

RATIOS = tuple(i / 10 for i in range(10))
SEARCH_ROWS = 512  # of a linear, evenly spaced, that scales are searched on
SCALE_GROUPS = {"attention": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class ScaleChoice:
    """The scale of a place, [k], and how it was made: E|x|^ratio, over weights^(1 - ratio) if `duo`."""

    scale: Tensor
    ratio: float
    duo: bool


def normalize_scale(s: Tensor) -> Tensor:
    """A scale whose least and greatest lie alike around 1."""
    s = s.clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def average_over_query_heads(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """[h·d] -> [h·d], equal for the query heads that share a value head, as their inputs come from the same rows."""
    x = rearrange(x, "(g r d) -> g r d", g=kv_heads, r=heads // kv_heads)
    return x.mean(1, keepdim=True).expand_as(x).flatten()


def candidate_scales(mean_abs: Tensor, weights: list[Tensor]) -> list[ScaleChoice]:
    """All that is tried; the first changes nothing."""
    relative_magnitude = torch.cat([w.abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-12) for w in weights]).mean(0)
    by_activation = [ScaleChoice(normalize_scale(mean_abs.clamp(min=1e-6) ** r), r, False) for r in RATIOS]
    by_activation_and_weight = [
        ScaleChoice(normalize_scale(mean_abs.clamp(min=1e-6) ** r / (relative_magnitude ** (1 - r) + 1e-4)), r, True)
        for r in RATIOS
    ]
    return by_activation + by_activation_and_weight


def search_channel_scale(
    weights: list[Tensor], hessian: HessianInfo, group_size: int, heads: tuple[int, int] | None = None
) -> ScaleChoice:
    """The scale after which rounding to the nearest level loses least of what cannot be made good elsewhere.

    weights: of the linears that share the inputs, [n, k] each; every linear's loss counts by its share of what it puts
    out. heads: query and value heads, if the scale must be equal for those that share.
    """
    mean_abs = hessian.mean_abs if heads is None else average_over_query_heads(hessian.mean_abs, *heads)
    weights = [w[:: -(-len(w) // SEARCH_ROWS)].to(hessian.hessian.dtype) for w in weights]
    energies = [((w @ hessian.hessian) * w).sum().clamp(min=torch.finfo(w.dtype).tiny) for w in weights]

    def loss(choice: ScaleChoice) -> float:
        s = choice.scale.view(len(hessian.schur_blocks), group_size)
        blocks, total = hessian.schur_blocks / (s[:, :, None] * s[:, None]), torch.zeros(())
        for w, energy in zip(weights, energies):
            for block in w.split(64):
                scaled = block * choice.scale
                grid = grid_from_range(*group_min_max(scaled, group_size)).expand_to_columns(w.shape[1])
                total = (
                    total + group_hessian_loss(grid.to_weights(grid.to_codes(scaled)) - scaled, blocks).sum() / energy
                )
        return float(total)

    candidates = candidate_scales(mean_abs, weights)
    if heads is not None:
        candidates = [
            replace(choice, scale=normalize_scale(average_over_query_heads(choice.scale, *heads)))
            for choice in candidates
        ]
    return min(candidates, key=loss)


def scale_columns(linear: Affine, s: Tensor) -> Affine:
    return Affine(linear.weight * s, linear.bias)


def unscale_rows(linear: Affine, s: Tensor) -> Affine:
    return Affine(linear.weight / s[:, None], None if linear.bias is None else linear.bias / s)


def unscale_norms(layer: Layer, scales: Mapping[str, Tensor]) -> Layer:
    """The layer with the scales of its places taken out of its norms."""
    norms = {"attention": "attention_norm", "mlp": "mlp_norm"}
    return replace(
        layer,
        **{n: getattr(layer, n) / scales[scale_group] for scale_group, n in norms.items() if scale_group in scales},
    )


def apply_scales_to_linear(layer: Layer, name: str, scales: Mapping[str, Tensor], kv_heads: int) -> Affine:
    """One linear with the scale of its place on its columns, and with that of the place behind it out of its rows, one
    after the other as the scales are listed.
    """
    linear = getattr(layer, name)
    for scale_group, s in scales.items():
        if name in SCALE_GROUPS[scale_group]:
            linear = scale_columns(linear, s)
        elif (name, scale_group) == ("up", "down"):
            linear = unscale_rows(linear, s)
        elif (name, scale_group) == ("v", "o"):
            d = linear.weight.shape[0] // kv_heads
            linear = unscale_rows(linear, rearrange(s, "(g r d) -> g r d", g=kv_heads, d=d)[:, 0].flatten())  # [g·d]
    return linear


def apply_scales(layer: Layer, scales: Mapping[str, Tensor], kv_heads: int) -> Layer:
    """The same layer, computing the same, with a scale [k] at some of its places."""
    linears = {
        name: apply_scales_to_linear(layer, name, scales, kv_heads) for names in SCALE_GROUPS.values() for name in names
    }
    return replace(unscale_norms(layer, scales), **linears)
