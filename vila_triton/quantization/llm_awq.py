"""AWQ with llm-awq's own search (Lin et al. 2023), objective for objective, so that results compare with published
caches.

Everything is judged on the original layer: no quantization error is propagated, and every scale is searched on unscaled
weights. Its known limits are kept: groups of one sign are not widened to hold 0, `o` has no scale with grouped queries,
q and k are not clipped, and fewer than 512 calibration tokens are refused.
"""

from dataclasses import dataclass, fields, replace

import torch
from einops import rearrange
from torch import Tensor

from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine, linear
from vila_triton.models.llama import Layer
from vila_triton.models.params import leaves
from vila_triton.ops import Int4

from .activations import CalibrationTokens, LinearInputs, attention_output, capture_linear_inputs
from .awq_scales import SCALE_GROUPS, apply_scales
from .quant_grid import QuantGrid, group_hessian_loss, pack_int4

GRID_STEPS = 20
CLIPPED_LINEARS = ("v", "o", "gate", "up", "down")
CLIP_TOKENS = 512


@dataclass(frozen=True)
class AwqSearchResult:
    """The result of searching a layer: scales [k] and their ratios by scale group, clips [n, G] by linear."""

    scales: dict[str, Tensor]
    clips: dict[str, Tensor]
    ratios: dict[str, float]

    def to(self, device: torch.device) -> "AwqSearchResult":
        """Move all tensors to a device."""
        scales, clips = ({name: x.to(device) for name, x in tensors.items()} for tensors in (self.scales, self.clips))
        return AwqSearchResult(scales, clips, self.ratios)


def minmax_grid(w: Tensor, group_size: int) -> QuantGrid:
    """Scales and zeros [n, G] in w's dtype, from the least to the greatest weight of a group, 0 among them or not."""
    x = rearrange(w, "n (G i) -> n G i", i=group_size)
    low, high = x.amin(-1), x.amax(-1)
    scales = (high - low).clamp(min=1e-5) / 15
    return QuantGrid(scales, (-(low / scales).round()).clamp(0, 15))


def quantize_codes(w: Tensor, grid: QuantGrid) -> Tensor:
    """Round w [n, k] to the codes of its grid."""
    columns = grid.expand_to_columns(w.shape[1])
    return ((w / columns.scales).round() + columns.zeros).clamp(0, 15)


def fake_quantize(w: Tensor, group_size: int) -> Tensor:
    """Quantize and dequantize w [n, k] (llm-awq: pseudo_quantize_tensor)."""
    grid = minmax_grid(w, group_size)
    return grid.expand_to_columns(w.shape[1]).to_weights(quantize_codes(w, grid))


def search_scale(
    layer: Layer,
    scale_group: str,
    activations: LinearInputs,
    tokens: CalibrationTokens,
    cfg: LlamaConfig,
    group_size: int,
) -> AwqSearchResult:
    """Search the scale of one scale group that changes least of the output of its module when the weights are rounded.

    Errors: ValueError if the inputs are not finite, or no scale gives a finite output.
    """
    x: Tensor = getattr(activations, scale_group)

    def output_of(p: Layer) -> Tensor:
        if scale_group == "attention":
            a = tokens.map_batches(lambda rows, cache: attention_output(p, rows, cfg, cache), x)
            return linear(p.o, a)
        return llama.mlp(p, x) if scale_group == "mlp" else linear(getattr(p, scale_group), x)

    if not torch.isfinite(x).all():
        raise ValueError(f"the inputs of {scale_group} are NaN or infinite, by calibration or by the weights before it")
    mean_abs, reference = x.abs().mean(0), output_of(layer)
    best, lowest_loss, ratio = torch.ones_like(mean_abs), torch.inf, 0.0
    for step in range(GRID_STEPS):
        s = (mean_abs ** (step / GRID_STEPS)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        scaled_layer = apply_scales(layer, {scale_group: s}, cfg.num_key_value_heads)
        if not all(torch.isfinite(leaf).all() for leaf in leaves(scaled_layer)):
            continue  # inputs that are nearly all 0: the product, or what is scaled by its root, leaves a float16
        candidates = {name: getattr(scaled_layer, name) for name in SCALE_GROUPS[scale_group]}
        candidates = {name: Affine(fake_quantize(p.weight, group_size) / s, p.bias) for name, p in candidates.items()}
        difference = reference - output_of(replace(layer, **candidates))
        loss = float((difference.float() if x.itemsize < 4 else difference).square().mean())
        if loss < lowest_loss:
            best, lowest_loss, ratio = s, loss, step / GRID_STEPS
    if lowest_loss == torch.inf:
        raise ValueError(f"no scale of {scale_group} gives a finite output")
    return AwqSearchResult({scale_group: best}, {}, {scale_group: ratio})


def search_clip(w: Tensor, x: Tensor, group_size: int) -> Tensor:
    """Search the bound on |w| of each group, from its maximum down to 0.55 of it, that changes least of its part of the
    output.

    w [n, k], x [s, k] -> [n, G]. Errors: ValueError for fewer than CLIP_TOKENS tokens.
    """
    require_clip_tokens(len(x))
    x = x[:: len(x) // CLIP_TOKENS]
    x = x.float() if x.itemsize < 4 else x
    group_inputs = rearrange(x, "s (G i) -> G i s", i=group_size)
    blocks = group_inputs @ group_inputs.mT / len(x)
    max_abs = rearrange(w, "n (G i) -> n G i", i=group_size).abs().amax(-1)
    best, lowest_loss = max_abs, torch.full_like(max_abs, torch.inf, dtype=x.dtype)
    for step in range(GRID_STEPS // 2):
        bound = max_abs * (1 - step / GRID_STEPS)
        loss = group_hessian_loss((fake_quantize(clip_to_bounds(w, bound), group_size) - w).to(x.dtype), blocks)
        best, lowest_loss = torch.where(loss < lowest_loss, bound, best), torch.minimum(loss, lowest_loss)
    return best


def require_clip_tokens(count: int) -> None:
    """Check that there are enough calibration tokens for `search_clip`. Errors: ValueError."""
    if count < CLIP_TOKENS:
        raise ValueError(f"llm-awq's clipping needs {CLIP_TOKENS} tokens of calibration, there are {count}")


def clip_to_bounds(w: Tensor, bound: Tensor) -> Tensor:
    """Clip w [n, k] to the bounds [n, G] of its groups."""
    limits = bound.repeat_interleave(w.shape[1] // bound.shape[1], 1)
    return torch.minimum(torch.maximum(w, -limits), limits)


def search_layer(
    layer: Layer, activations: LinearInputs, tokens: CalibrationTokens, cfg: LlamaConfig, group_size: int
) -> AwqSearchResult:
    """Search the scales and clips of one layer from the inputs of its linears."""
    scale_groups = [g for g in SCALE_GROUPS if g != "o" or layer.v.weight.shape == layer.o.weight.shape]
    results = [search_scale(layer, g, activations, tokens, cfg, group_size) for g in scale_groups]
    scales = {g: s for result in results for g, s in result.scales.items()}
    layer = apply_scales(layer, scales, cfg.num_key_value_heads)
    clips = {}
    for scale_group, names in SCALE_GROUPS.items():
        x = getattr(activations, scale_group)
        x = x / scales[scale_group] if scale_group in scales else x
        clipped = filter(CLIPPED_LINEARS.__contains__, names)
        clips |= {name: search_clip(getattr(layer, name).weight, x, group_size) for name in clipped}
    return AwqSearchResult(scales, clips, {g: ratio for result in results for g, ratio in result.ratios.items()})


def apply_search_result(layer: Layer, result: AwqSearchResult, cfg: LlamaConfig, group_size: int) -> Layer:
    """Scale, clip and quantize a layer. Errors: as `check_layer`."""
    layer = apply_scales(layer, result.scales, cfg.num_key_value_heads)
    check_layer(layer, group_size, " with the scales of its inputs and outputs")
    for name in (name for names in SCALE_GROUPS.values() for name in names):
        scaled = getattr(layer, name)
        w = clip_to_bounds(scaled.weight, result.clips[name]) if name in result.clips else scaled.weight
        layer = replace(layer, **{name: Affine(quantize_int4(w, group_size), scaled.bias)})
    return layer


def check_layer(layer: Layer, group_size: int, context: str = "") -> None:
    """Check that a layer is finite, and fits float16 scales. Errors: ValueError naming the linear."""
    for name in (field.name for field in fields(layer)):
        child = getattr(layer, name)
        if not all(torch.isfinite(leaf).all() for leaf in leaves(child)):
            raise ValueError(f"{name}{context} holds NaN or infinity")
        if isinstance(child, Affine) and not torch.isfinite(minmax_grid(child.weight, group_size).scales.half()).all():
            raise ValueError(f"{name}{context} has a group wider than its dtype or 15 float16 scales")


def quantize_int4(w: Tensor, group_size: int) -> Int4:
    """Quantize w [n, k] to its minmax grid."""
    grid = minmax_grid(w, group_size)
    return pack_int4(quantize_codes(w, grid), grid, torch.float16)


def quantize_layer(
    layer: Layer,
    x: Tensor,
    tokens: CalibrationTokens,
    cfg: LlamaConfig,
    group_size: int,
    result: AwqSearchResult | None = None,
) -> tuple[Layer, Tensor, AwqSearchResult]:
    """Quantize one layer -> the layer, its output before quantization, and the search result, searched or given.

    Errors: as `check_layer`.
    """
    check_layer(layer, group_size)
    activations = capture_linear_inputs(layer, x, tokens, cfg)
    result = search_layer(layer, activations, tokens, cfg, group_size) if result is None else result
    return apply_search_result(layer, result, cfg, group_size), activations.out, result
