"""CLIP's vision transformer (Radford et al. 2021): SigLIP's layers, a class token, a norm before the first layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import VisionConfig
from .layers import Affine, Leaf, declare_norm, layer_norm
from .params import Spec
from .vision_layers import declare_patch, patches, positions, trained_positions, with_class_token
from .vision_siglip import Layer, block, declare_layer

__all__ = ["Clip", "block", "declare", "embed"]


@dataclass(frozen=True)
class Clip:
    patch: Affine  # weight [e, c, patch, patch], no bias
    class_token: Leaf  # [e]
    position: Leaf  # [1 + grid², e]
    pre_norm: Affine
    layers: tuple[Layer, ...]
    post_norm: Affine  # in every checkpoint, though VILA reads a layer before it


def declare(cfg: VisionConfig, dtype: torch.dtype) -> Clip:
    """The tree of a tower, its leaves named as in transformers 5's `CLIPVisionModel`."""
    e = cfg.hidden_size
    return Clip(
        declare_patch(cfg, dtype, bias=False),
        Spec((e,), "embeddings.class_embedding", dtype),
        Spec((trained_positions(cfg), e), "embeddings.position_embedding.weight", dtype),
        declare_norm(e, "pre_layrnorm", dtype),  # spelled so in every checkpoint
        tuple(declare_layer(cfg, i, dtype) for i in range(cfg.num_hidden_layers)),
        declare_norm(e, "post_layernorm", dtype),
    )


def embed(p: Clip, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Tiles [b, c, tile, tile] -> [b, 1 + grid², e]."""
    x = with_class_token(p.class_token, patches(p.patch, pixels, cfg)) + positions(p.position, cfg)
    return layer_norm(p.pre_norm, x, cfg.layer_norm_eps)
