"""SigLIP's vision transformer (Zhai et al. 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import VisionConfig
from .layers import Affine, Leaf, LinearFn, layer_norm, linear, linear_specs, norm_specs
from .params import ParameterSpec
from .vision_layers import (
    ACTIVATIONS,
    num_trained_positions,
    patch_embeddings,
    patch_specs,
    position_embeddings,
    self_attention,
)


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer of SigLIP or CLIP."""

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
    """The parameters of a tower."""

    patch: Affine  # weight [e, c, patch, patch]
    position: Leaf  # [grid², e]
    layers: tuple[Layer, ...]
    post_norm: Affine  # in every checkpoint, though VILA reads a layer before it


def layer_specs(cfg: VisionConfig, i: int, dtype: torch.dtype) -> Layer:
    """Specs of one layer of SigLIP or CLIP, named as in transformers."""
    e, f, prefix = cfg.hidden_size, cfg.intermediate_size, f"encoder.layers.{i}"

    def linear_spec(n: int, k: int, key: str) -> Affine:
        return linear_specs(n, k, f"{prefix}.{key}", dtype, group_size=cfg.group_size)

    return Layer(
        norm_specs(e, f"{prefix}.layer_norm1", dtype),
        linear_spec(e, e, "self_attn.q_proj"),
        linear_spec(e, e, "self_attn.k_proj"),
        linear_spec(e, e, "self_attn.v_proj"),
        linear_spec(e, e, "self_attn.out_proj"),
        norm_specs(e, f"{prefix}.layer_norm2", dtype),
        linear_spec(f, e, "mlp.fc1"),
        linear_spec(e, f, "mlp.fc2"),
    )


def param_specs(cfg: VisionConfig, dtype: torch.dtype) -> Siglip:
    """Specs of a tower, named as in transformers 5's `SiglipVisionModel`."""
    return Siglip(
        patch_specs(cfg, dtype),
        ParameterSpec((num_trained_positions(cfg), cfg.hidden_size), "embeddings.position_embedding.weight", dtype),
        tuple(layer_specs(cfg, i, dtype) for i in range(cfg.num_hidden_layers)),
        norm_specs(cfg.hidden_size, "post_layernorm", dtype),
    )


def embed(p: Siglip, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Embed tiles [b, c, tile, tile] -> [b, grid², e]."""
    return patch_embeddings(p.patch, pixels, cfg) + position_embeddings(p.position, cfg)


def block(p: Layer, x: Tensor, cfg: VisionConfig, apply_linear: LinearFn = linear) -> Tensor:
    """Run one layer: x [b, s, e] -> [b, s, e]."""
    y = layer_norm(p.norm1, x, cfg.layer_norm_eps)
    q, k, v = (apply_linear(w, y) for w in (p.q, p.k, p.v))
    x = x + apply_linear(p.out, self_attention(q, k, v, cfg.num_attention_heads))
    y = layer_norm(p.norm2, x, cfg.layer_norm_eps)
    return x + apply_linear(p.fc2, ACTIVATIONS[cfg.hidden_act](apply_linear(p.fc1, y)))
