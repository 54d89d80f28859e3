"""AWQ's channel scales (Lin et al. 2023): inputs of a linear are scaled up before rounding, and their source scaled
down.

A scale s [k] multiplies the columns of the linears that share an input; what makes that input, a norm's weight or the
rows of the linear before, is divided by it. The layer computes the same until its weights are rounded. Four groups of
linears of a decoder layer allow that, `SCALE_GROUPS`.
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
SEARCH_ROWS = 512  # rows of a weight, evenly spaced, on which scales are searched
SCALE_GROUPS = {"attention": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class ScaleChoice:
    """A channel scale [k] and the formula it came from: E|x|^ratio, with `uses_weights` divided by the weights'
    relative size^(1 - ratio).
    """

    scale: Tensor
    ratio: float
    uses_weights: bool


def normalize_scale(s: Tensor) -> Tensor:
    """Divide a scale by the geometric mean of its extremes, so that they lie alike around 1."""
    s = s.clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def average_over_query_heads(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Average x [h·d] over the query heads that share a KV head, whose inputs of `o` come from the same rows of v."""
    x = rearrange(x, "(g r d) -> g r d", g=kv_heads, r=heads // kv_heads)
    return x.mean(1, keepdim=True).expand_as(x).flatten()


def candidate_scales(mean_abs: Tensor, weights: list[Tensor]) -> list[ScaleChoice]:
    """All scales that are tried; the first is 1 everywhere."""
    relative_magnitude = torch.cat([w.abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-12) for w in weights]).mean(0)
    x, w = mean_abs.clamp(min=1e-6), relative_magnitude
    by_activation = [ScaleChoice(normalize_scale(x**r), r, False) for r in RATIOS]
    by_both = [ScaleChoice(normalize_scale(x**r / (w ** (1 - r) + 1e-4)), r, True) for r in RATIOS]
    return by_activation + by_both


def search_channel_scale(
    weights: list[Tensor], hessian: HessianInfo, group_size: int, heads: tuple[int, int] | None = None
) -> ScaleChoice:
    """Search the channel scale of one scale group: the candidate with the least Hessian-weighted round-to-nearest
    error.

    weights: the linears that share the inputs, [n, k] each; the error of each is divided by the energy of its output.
    Errors are weighed by the Schur complement per group, since GPTQ compensates the rest. heads: (query heads, KV
    heads) where the scale must be equal for query heads that share a KV head (v -> o). Only SEARCH_ROWS evenly spaced
    rows of a weight are tried.
    """
    mean_abs = hessian.mean_abs if heads is None else average_over_query_heads(hessian.mean_abs, *heads)
    weights = [w[:: -(-len(w) // SEARCH_ROWS)].to(hessian.hessian.dtype) for w in weights]
    energies = [((w @ hessian.hessian) * w).sum().clamp(min=torch.finfo(w.dtype).tiny) for w in weights]

    def loss(choice: ScaleChoice) -> float:
        s = choice.scale.view(len(hessian.schur_blocks), group_size)
        blocks, total = hessian.schur_blocks / (s[:, :, None] * s[:, None]), torch.zeros(())
        for w, energy in zip(weights, energies):
            for rows in w.split(64):
                scaled = rows * choice.scale
                grid = grid_from_range(*group_min_max(scaled, group_size)).expand_to_columns(w.shape[1])
                error = grid.to_weights(grid.to_codes(scaled)) - scaled
                total = total + group_hessian_loss(error, blocks).sum() / energy
        return float(total)

    candidates = candidate_scales(mean_abs, weights)
    if heads is not None:
        candidates = [replace(c, scale=normalize_scale(average_over_query_heads(c.scale, *heads))) for c in candidates]
    return min(candidates, key=loss)


def scale_columns(linear: Affine, s: Tensor) -> Affine:
    """Multiply the columns of a linear [n, k] by s [k]."""
    return Affine(linear.weight * s, linear.bias)


def unscale_rows(linear: Affine, s: Tensor) -> Affine:
    """Divide the outputs of a linear [n, k], its rows and its bias, by s [n]."""
    return Affine(linear.weight / s[:, None], None if linear.bias is None else linear.bias / s)


def unscale_norms(layer: Layer, scales: Mapping[str, Tensor]) -> Layer:
    """Divide the norms of a layer by the scales of the linears behind them."""
    norms = {"attention": "attention_norm", "mlp": "mlp_norm"}
    return replace(layer, **{norm: getattr(layer, norm) / scales[g] for g, norm in norms.items() if g in scales})


def apply_scales_to_linear(layer: Layer, name: str, scales: Mapping[str, Tensor], kv_heads: int) -> Affine:
    """The linear `name` of a layer with its columns multiplied by the scale of its own group, and its rows divided by
    the scale of the group behind it. Scales are applied one after the other in their order.
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
    """Scale the linears and norms of a layer by a scale [k] for some of its scale groups; it computes the same."""
    names = (name for group in SCALE_GROUPS.values() for name in group)
    linears = {name: apply_scales_to_linear(layer, name, scales, kv_heads) for name in names}
    return replace(unscale_norms(layer, scales), **linears)
