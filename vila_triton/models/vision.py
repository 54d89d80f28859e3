"""The picture tower: SigLIP's vision transformer (Zhai et al. 2023) as pure functions over a tree of parameters."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vila_triton import ops
from vila_triton.ops import encoder_attention

from .config import VisionConfig
from .layers import Affine, Leaf, declare_linear, declare_norm, layer_norm, linear
from .params import Spec


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


def declare(cfg: VisionConfig, dtype: torch.dtype) -> Siglip:
    """The tree of a tower, its leaves named as in transformers 5's `SiglipVisionModel`."""
    e, f = cfg.hidden_size, cfg.intermediate_size

    def layer(i: int) -> Layer:
        at = f"encoder.layers.{i}"
        return Layer(
            declare_norm(e, f"{at}.layer_norm1", dtype),
            declare_linear(e, e, f"{at}.self_attn.q_proj", dtype),
            declare_linear(e, e, f"{at}.self_attn.k_proj", dtype),
            declare_linear(e, e, f"{at}.self_attn.v_proj", dtype),
            declare_linear(e, e, f"{at}.self_attn.out_proj", dtype),
            declare_norm(e, f"{at}.layer_norm2", dtype),
            declare_linear(f, e, f"{at}.mlp.fc1", dtype),
            declare_linear(e, f, f"{at}.mlp.fc2", dtype),
        )

    patch = Spec((e, cfg.num_channels, cfg.patch_size, cfg.patch_size), "embeddings.patch_embedding.weight", dtype)
    return Siglip(
        Affine(patch, Spec((e,), "embeddings.patch_embedding.bias", dtype, "zeros")),
        Spec((cfg.grid**2, e), "embeddings.position_embedding.weight", dtype),
        tuple(layer(i) for i in range(cfg.num_hidden_layers)),
        declare_norm(e, "post_layernorm", dtype),
    )


def embed(p: Siglip, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Pictures [b, c, H, W] -> patch embeddings [b, grid², e], row by row. Errors: ValueError for another size."""
    expected = (cfg.num_channels, cfg.image_size, cfg.image_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
        raise ValueError(
            f"images have shape {list(pixels.shape)}, expected [pictures, {', '.join(map(str, expected))}]"
        )
    size, side = cfg.patch_size, cfg.grid * cfg.patch_size  # pixels beyond the last whole patch are not seen
    patches = rearrange(pixels[..., :side, :side], "b c (y p) (x q) -> b (y x) (c p q)", p=size, q=size)
    return ops.linear(patches, p.patch.weight.flatten(1), p.patch.bias) + p.position


def attention(p: Layer, x: Tensor, cfg: VisionConfig) -> Tensor:
    q, k, v = (rearrange(linear(w, x), "b s (h d) -> b s h d", h=cfg.num_attention_heads) for w in (p.q, p.k, p.v))
    out = encoder_attention(q, k, v, q.shape[-1] ** -0.5)
    return linear(p.out, rearrange(out, "b s h d -> b s (h d)"))


def mlp(p: Layer, x: Tensor) -> Tensor:
    return linear(p.fc2, F.gelu(linear(p.fc1, x), approximate="tanh"))


def vision_tower(p: Siglip, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Pictures [b, c, H, W] -> the features of the layer that the config selects, [b, grid², e]."""
    x = embed(p, pixels, cfg)
    for layer in p.layers[: len(p.layers) + 1 + cfg.select_layer]:
        x = x + attention(layer, layer_norm(layer.norm1, x, cfg.layer_norm_eps), cfg)
        x = x + mlp(layer, layer_norm(layer.norm2, x, cfg.layer_norm_eps))
    return x
