"""AWQ as llm-awq searches it (Lin et al. 2023), objective for objective, so that results compare with published caches.

Everything is judged on the layer as it was: no rounding error is carried on, every scale is searched on unscaled
weights. What that costs is known: groups of one sign are not widened to hold 0, `o` has no scale under grouped queries,
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

from .activations import Inputs, Tokens, attended, inputs
from .awq_scales import PLACES, scaled
from .quant_grid import Grid, block_loss, packed

GRID = 20
CLIPPED = ("v", "o", "gate", "up", "down")
CLIP_TOKENS = 512


@dataclass(frozen=True)
class Found:
    """What a search of one layer yields: scales [k] by place, clips [n, G] by linear, and the ratios of the scales."""

    scales: dict[str, Tensor]
    clips: dict[str, Tensor]
    ratios: dict[str, float]

    def to(self, device: torch.device) -> "Found":
        scales, clips = ({name: x.to(device) for name, x in of.items()} for of in (self.scales, self.clips))
        return Found(scales, clips, self.ratios)


def grid_of(w: Tensor, group: int) -> Grid:
    """Scales and zeros [n, G] in w's dtype: least to greatest weight of a group, 0 among them or not."""
    x = rearrange(w, "n (G i) -> n G i", i=group)
    low, high = x.amin(-1), x.amax(-1)
    scales = (high - low).clamp(min=1e-5) / 15
    return Grid(scales, (-(low / scales).round()).clamp(0, 15))


def codes(w: Tensor, grid: Grid) -> Tensor:
    wide = grid.spread(w.shape[1])
    return ((w / wide.scales).round() + wide.zeros).clamp(0, 15)


def pseudo(w: Tensor, group: int) -> Tensor:
    """w rounded, as numbers: [n, k]."""
    grid = grid_of(w, group)
    return grid.spread(w.shape[1]).value(codes(w, grid))


def search_scale(layer: Layer, place: str, given: Inputs, tokens: Tokens, cfg: LlamaConfig, group: int) -> Found:
    """The scale of one place after which rounding changes least what the module it belongs to puts out."""
    x: Tensor = getattr(given, place)

    def out(p: Layer) -> Tensor:
        if place == "attention":
            a = tokens.through(lambda rows, cache: attended(p, rows, cfg, cache), x)
            return linear(p.o, a)
        return llama.mlp(p, x) if place == "mlp" else linear(getattr(p, place), x)

    if not torch.isfinite(x).all():
        raise ValueError(f"what {place} is given is NaN or infinite, by calibration or by the weights before it")
    mean_abs, wanted = x.abs().mean(0), out(layer)
    best, least, ratio = torch.ones_like(mean_abs), torch.inf, 0.0
    for step in range(GRID):
        s = (mean_abs ** (step / GRID)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        louder = scaled(layer, {place: s}, cfg.num_key_value_heads)
        if not all(torch.isfinite(leaf).all() for leaf in leaves(louder)):
            continue  # inputs that are nearly all 0: the product, or what is scaled by its root, leaves a float16
        tried = {name: getattr(louder, name) for name in PLACES[place]}
        tried = {name: Affine(pseudo(p.weight, group) / s, p.bias) for name, p in tried.items()}
        difference = wanted - out(replace(layer, **tried))
        loss = float((difference.float() if x.itemsize < 4 else difference).square().mean())
        if loss < least:
            best, least, ratio = s, loss, step / GRID
    if least == torch.inf:
        raise ValueError(f"no scale of {place} gives a finite output")
    return Found({place: best}, {}, {place: ratio})


def search_clip(w: Tensor, x: Tensor, group: int) -> Tensor:
    """Per group the bound on |w|, from all of the greatest down to 0.55 of it, that changes least of its own part of
    the output: w [n, k], x [s, k] -> [n, G].
    """
    if len(x) < CLIP_TOKENS:
        raise ValueError(f"upstream's clipping needs {CLIP_TOKENS} tokens of calibration, there are {len(x)}")
    x = x[:: len(x) // CLIP_TOKENS]
    x = x.float() if x.itemsize < 4 else x
    parts = rearrange(x, "s (G i) -> G i s", i=group)
    blocks = parts @ parts.mT / len(x)
    greatest = rearrange(w, "n (G i) -> n G i", i=group).abs().amax(-1)
    best, least = greatest, torch.full_like(greatest, torch.inf, dtype=x.dtype)
    for step in range(GRID // 2):
        bound = greatest * (1 - step / GRID)
        loss = block_loss((pseudo(clip(w, bound), group) - w).to(x.dtype), blocks)
        best, least = torch.where(loss < least, bound, best), torch.minimum(loss, least)
    return best


def clip(w: Tensor, bound: Tensor) -> Tensor:
    """w [n, k] within the bounds [n, G] of its groups."""
    wide = bound.repeat_interleave(w.shape[1] // bound.shape[1], 1)
    return torch.minimum(torch.maximum(w, -wide), wide)


def search(layer: Layer, given: Inputs, tokens: Tokens, cfg: LlamaConfig, group: int) -> Found:
    """Scales and clips of one layer from what its linears are given."""
    places = [p for p in PLACES if p != "o" or layer.v.weight.shape == layer.o.weight.shape]
    found = [search_scale(layer, place, given, tokens, cfg, group) for place in places]
    scales = {place: s for f in found for place, s in f.scales.items()}
    layer = scaled(layer, scales, cfg.num_key_value_heads)
    clips = {}
    for place, names in PLACES.items():
        x = getattr(given, place)
        x = x / scales[place] if place in scales else x
        clips |= {name: search_clip(getattr(layer, name).weight, x, group) for name in names if name in CLIPPED}
    return Found(scales, clips, {place: r for f in found for place, r in f.ratios.items()})


def apply(layer: Layer, found: Found, cfg: LlamaConfig, group: int) -> Layer:
    """The layer scaled, clipped and rounded to int4. Errors: as `check`."""
    layer = scaled(layer, found.scales, cfg.num_key_value_heads)
    check(layer, group, " with the scales of its inputs and outputs")
    for name in (name for names in PLACES.values() for name in names):
        old = getattr(layer, name)
        w = clip(old.weight, found.clips[name]) if name in found.clips else old.weight
        layer = replace(layer, **{name: Affine(to_int4(w, group), old.bias)})
    return layer


def check(layer: Layer, group: int, when: str = "") -> None:
    """Errors: ValueError naming what of the layer is not finite, or too wide for float16 scales."""
    for name in (field.name for field in fields(layer)):
        part = getattr(layer, name)
        if not all(torch.isfinite(leaf).all() for leaf in leaves(part)):
            raise ValueError(f"{name}{when} holds NaN or infinity")
        if isinstance(part, Affine) and not torch.isfinite(grid_of(part.weight, group).scales.half()).all():
            raise ValueError(f"{name}{when} has a group wider than its dtype or 15 float16 scales")


def to_int4(w: Tensor, group: int) -> Int4:
    grid = grid_of(w, group)
    return packed(codes(w, grid), grid, torch.float16)


def quantize_layer(
    layer: Layer, x: Tensor, tokens: Tokens, cfg: LlamaConfig, group: int, found: Found | None = None
) -> tuple[Layer, Tensor, Found]:
    """One layer rounded, what it gave out before that, and what was found (or given). Errors: as `check`."""
    check(layer, group)
    given = inputs(layer, x, tokens, cfg)
    found = search(layer, given, tokens, cfg, group) if found is None else found
    return apply(layer, found, cfg, group), given.out, found
