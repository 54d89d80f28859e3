"""The projector: picture features to the width of the language model, four patches to one token."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .config import ProjectorConfig
from .layers import Affine, declare_linear, declare_norm, layer_norm, linear

EPS = 1e-5  # torch's default, which the checkpoints were trained with


@dataclass(frozen=True)
class MlpDownsample:
    norm: Affine  # [4·m]
    fc1: Affine  # [e, 4·m]
    fc2: Affine  # [e, e]


def declare(cfg: ProjectorConfig, dtype: torch.dtype) -> MlpDownsample:
    """The tree of VILA's `mlp_downsample`, its leaves named as in the released checkpoints."""
    m, e = cfg.mm_hidden_size, cfg.hidden_size
    return MlpDownsample(
        declare_norm(4 * m, "layers.1", dtype),
        declare_linear(e, 4 * m, "layers.2", dtype),
        declare_linear(e, e, "layers.4", dtype),
    )


def downsample(x: Tensor, order: str) -> Tensor:
    """2×2 patches side by side: [b, side², m] -> [b, ceil(side/2)², 4·m]; an odd side is padded with zeros.

    A token holds its patches as top left, top right, bottom left, bottom right. Tokens go down the columns in
    VILA 1.5's order, along the rows in later releases'.
    """
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ValueError(f"mlp_downsample needs a square of patches, got {x.shape[1]}")
    x = rearrange(x, "b (y x) m -> b y x m", y=side)
    x = F.pad(x, (0, 0, 0, side % 2, 0, side % 2))
    tokens = "(j i)" if order == "column" else "(i j)"
    return rearrange(x, f"b (i p) (j q) m -> b {tokens} (p q m)", p=2, q=2)


def projector(p: MlpDownsample, x: Tensor, cfg: ProjectorConfig) -> Tensor:
    """Picture features [b, side², m] -> [b, tokens, e]."""
    x = layer_norm(p.norm, downsample(x, cfg.token_order), EPS)
    return linear(p.fc2, F.gelu(linear(p.fc1, x)))
