"""SigLIP's vision transformer (Zhai et al. 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import VisionConfig
from .layers import Affine, Leaf, Linear, declare_linear, declare_norm, layer_norm, linear
from .params import Spec
from .vision_layers import ACTIVATIONS, attend, declare_patch, patches, positions, trained_positions


@dataclass(frozen=True)
class Layer:
    norm1: Affine
    q: Affine
    k: Affine
    v: Affine
    out: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


@dataclass(frozen=True)
class Siglip:
    patch: Affine  # weight [e, c, patch, patch]
    position: Leaf  # [grid², e]
    layers: tuple[Layer, ...]
    post_norm: Affine  # in every checkpoint, though VILA reads a layer before it


def declare_layer(cfg: VisionConfig, i: int, dtype: torch.dtype) -> Layer:
    """A layer as SigLIP and CLIP have it, named as in transformers."""
    e, f, at = cfg.hidden_size, cfg.intermediate_size, f"encoder.layers.{i}"

    def dense(n: int, k: int, key: str) -> Affine:
        return declare_linear(n, k, f"{at}.{key}", dtype, group=cfg.group_size)

    return Layer(
        declare_norm(e, f"{at}.layer_norm1", dtype),
        dense(e, e, "self_attn.q_proj"),
        dense(e, e, "self_attn.k_proj"),
        dense(e, e, "self_attn.v_proj"),
        dense(e, e, "self_attn.out_proj"),
        declare_norm(e, f"{at}.layer_norm2", dtype),
        dense(f, e, "mlp.fc1"),
        dense(e, f, "mlp.fc2"),
    )


def declare(cfg: VisionConfig, dtype: torch.dtype) -> Siglip:
    """The tree of a tower, its leaves named as in transformers 5's `SiglipVisionModel`."""
    return Siglip(
        declare_patch(cfg, dtype),
        Spec((trained_positions(cfg), cfg.hidden_size), "embeddings.position_embedding.weight", dtype),
        tuple(declare_layer(cfg, i, dtype) for i in range(cfg.num_hidden_layers)),
        declare_norm(cfg.hidden_size, "post_layernorm", dtype),
    )


def embed(p: Siglip, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Tiles [b, c, tile, tile] -> [b, grid², e]."""
    return patches(p.patch, pixels, cfg) + positions(p.position, cfg)


def block(p: Layer, x: Tensor, cfg: VisionConfig, linear: Linear = linear) -> Tensor:
    """One layer: x [b, s, e] -> [b, s, e]."""
    y = layer_norm(p.norm1, x, cfg.layer_norm_eps)
    q, k, v = (linear(w, y) for w in (p.q, p.k, p.v))
    x = x + linear(p.out, attend(q, k, v, cfg.num_attention_heads))
    y = layer_norm(p.norm2, x, cfg.layer_norm_eps)
    return x + linear(p.fc2, ACTIVATIONS[cfg.hidden_act](linear(p.fc1, y)))
