"""The projector: image features of the vision tower to image tokens as wide as the language model's hidden states.

Most types first merge a square of neighbouring patches into one token.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .config import ProjectorConfig
from .layers import Affine, LinearFn, layer_norm, linear, linear_specs, norm_specs

EPS = 1e-5  # torch's default, which the checkpoints were trained with


@dataclass(frozen=True)
class Stage:
    """A linear map, in some types behind a layer norm."""

    norm: Affine | None
    linear: Affine


@dataclass(frozen=True)
class Projector:
    """The parameters of a projector."""

    stages: tuple[Stage, ...]  # a GELU between one and the next; none in `identity`


def layer_widths(cfg: ProjectorConfig) -> tuple[int, ...]:
    """The width of a token before the first linear map and after each."""
    m, e = cfg.mm_hidden_size, cfg.hidden_size
    return {
        "identity": (m,),
        "linear": (m, e),
        "mlp_downsample": (4 * m, e, e),
        "mlp_downsample_2x2_fix": (4 * m, e, e),
        "mlp_downsample_3x3_fix": (9 * m, 3 * m, e, e),
        "mlp_downsample_3x3_s2": (9 * m, 3 * m, m, m // 3, e, e),
        "mlp_downsample_3x3_s2_new": (9 * m, 4 * m, 2 * m, m, m // 3, e, e),
    }.get(cfg.mm_projector_type, (m, *[e] * cfg.num_linears))


def param_specs(cfg: ProjectorConfig, dtype: torch.dtype) -> Projector:
    """Specs of a projector, named as in the released checkpoints.

    Names count downsampling (where there is one), norms, linear maps and GELUs; the type `linear` has one layer and no
    numbers.
    """
    sizes, has_norms = layer_widths(cfg), cfg.downsample_factor > 1
    stages, index = [], int(has_norms)
    for i, (k, n) in enumerate(pairwise(sizes)):
        norm = norm_specs(k, f"layers.{index}", dtype) if has_norms and i < len(sizes) - 2 else None
        index += norm is not None
        key = "layers" if cfg.mm_projector_type == "linear" else f"layers.{index}"
        stages.append(Stage(norm, linear_specs(n, k, key, dtype, group_size=cfg.group_size)))
        index += 2  # the linear map and the GELU after it
    return Projector(tuple(stages))


def downsample(x: Tensor, token_order: str, n: int = 2) -> Tensor:
    """Concatenate squares of n × n patches, padded with zeros at the edges: [b, side², m] -> [b, ceil(side / n)²,
    n²·m].

    Within a token the patches lie row by row: for n = 2 top left, top right, bottom left, bottom right. The tokens
    follow the columns of the image with token_order "column", as in VILA 1.5, and the rows with "row", as in later
    releases. Errors: ValueError.
    """
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ValueError(f"mlp_downsample needs a square of patches, got {x.shape[1]}")
    x = rearrange(x, "b (y x) m -> b y x m", y=side)
    x = F.pad(x, (0, 0, 0, -side % n, 0, -side % n))
    token_axes = "(j i)" if token_order == "column" else "(i j)"
    return rearrange(x, f"b (i p) (j q) m -> b {token_axes} (p q m)", p=n, q=n)


def forward(p: Projector, x: Tensor, cfg: ProjectorConfig, apply_linear: LinearFn = linear) -> Tensor:
    """Project image features [b, features, m] -> image tokens [b, tokens, e]."""
    x = downsample(x, cfg.effective_token_order, cfg.downsample_factor) if cfg.downsample_factor > 1 else x
    for i, stage in enumerate(p.stages):
        x = F.gelu(x) if i else x
        x = layer_norm(stage.norm, x, EPS) if stage.norm else x
        x = apply_linear(stage.linear, x)
    return x
