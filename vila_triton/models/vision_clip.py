"""CLIP's vision transformer (Radford et al. 2021): SigLIP's layers, with a class token and a norm before the first
layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import VisionConfig
from .layers import Affine, Leaf, layer_norm, norm_specs
from .params import ParameterSpec
from .vision_layers import (
    num_trained_positions,
    patch_embeddings,
    patch_specs,
    position_embeddings,
    prepend_class_token,
)
from .vision_siglip import Layer, block, layer_specs

__all__ = ["Clip", "block", "embed", "param_specs"]


@dataclass(frozen=True)
class Clip:
    """The parameters of a tower."""

    patch: Affine  # weight [e, c, patch, patch], no bias
    class_token: Leaf  # [e]
    position: Leaf  # [1 + grid², e]
    pre_norm: Affine
    layers: tuple[Layer, ...]
    post_norm: Affine  # in every checkpoint, though VILA reads a layer before it


def param_specs(cfg: VisionConfig, dtype: torch.dtype) -> Clip:
    """Specs of a tower, named as in transformers 5's `CLIPVisionModel`."""
    e = cfg.hidden_size
    return Clip(
        patch_specs(cfg, dtype, bias=False),
        ParameterSpec((e,), "embeddings.class_embedding", dtype),
        ParameterSpec((num_trained_positions(cfg), e), "embeddings.position_embedding.weight", dtype),
        norm_specs(e, "pre_layrnorm", dtype),  # spelled so in every checkpoint
        tuple(layer_specs(cfg, i, dtype) for i in range(cfg.num_hidden_layers)),
        norm_specs(e, "post_layernorm", dtype),
    )


def embed(p: Clip, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Embed tiles [b, c, tile, tile] -> [b, 1 + grid², e]."""
    x = prepend_class_token(p.class_token, patch_embeddings(p.patch, pixels, cfg)) + position_embeddings(
        p.position, cfg
    )
    return layer_norm(p.pre_norm, x, cfg.layer_norm_eps)
