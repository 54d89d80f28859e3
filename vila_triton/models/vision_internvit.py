"""InternViT (Chen et al. 2023): fused projection to queries, keys and values, RMS norms, QK-norm and layer scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vila_triton import ops

from .config import VisionConfig
from .layers import Affine, Leaf, LinearFn, layer_norm, linear, linear_specs, norm_specs
from .params import ParameterSpec
from .vision_layers import (
    ACTIVATIONS,
    num_trained_positions,
    patch_embeddings,
    patch_specs,
    position_embeddings,
    prepend_class_token,
    self_attention,
)


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer."""

    norm1: Affine
    qkv: Affine  # [3 e, e]
    q_norm: Affine | None  # [e], over the width of all heads together
    k_norm: Affine | None
    proj: Affine
    scale1: Leaf  # [e]
    norm2: Affine
    fc1: Affine
    fc2: Affine
    scale2: Leaf


@dataclass(frozen=True)
class InternVit:
    """The parameters of a tower."""

    patch: Affine  # weight [e, c, patch, patch]
    class_token: Leaf  # [1, 1, e]
    position: Leaf  # [1, 1 + grid², e]
    layers: tuple[Layer, ...]


def rms_norm_specs(e: int, key: str, dtype: torch.dtype) -> Affine:
    """Specs of an RMS norm over e values: a weight without a bias."""
    return Affine(ParameterSpec((e,), f"{key}.weight", dtype, "ones"), None)


def param_specs(cfg: VisionConfig, dtype: torch.dtype) -> InternVit:
    """Specs of a tower, named as in the released InternViT-6B."""
    e, f = cfg.hidden_size, cfg.intermediate_size
    norm_spec = rms_norm_specs if cfg.norm_type == "rms_norm" else norm_specs

    def linear_spec(n: int, k: int, key: str, bias: bool = True) -> Affine:
        return linear_specs(n, k, key, dtype, bias, cfg.group_size)

    def layer_specs(i: int) -> Layer:
        prefix = f"encoder.layers.{i}"
        return Layer(
            norm_spec(e, f"{prefix}.norm1", dtype),
            linear_spec(3 * e, e, f"{prefix}.attn.qkv", cfg.qkv_bias),
            rms_norm_specs(e, f"{prefix}.attn.q_norm", dtype) if cfg.qk_normalization else None,
            rms_norm_specs(e, f"{prefix}.attn.k_norm", dtype) if cfg.qk_normalization else None,
            linear_spec(e, e, f"{prefix}.attn.proj"),
            ParameterSpec((e,), f"{prefix}.ls1", dtype, "ones"),
            norm_spec(e, f"{prefix}.norm2", dtype),
            linear_spec(f, e, f"{prefix}.mlp.fc1"),
            linear_spec(e, f, f"{prefix}.mlp.fc2"),
            ParameterSpec((e,), f"{prefix}.ls2", dtype, "ones"),
        )

    return InternVit(
        patch_specs(cfg, dtype),
        ParameterSpec((1, 1, e), "embeddings.class_embedding", dtype),
        ParameterSpec((1, num_trained_positions(cfg), e), "embeddings.position_embedding", dtype),
        tuple(layer_specs(i) for i in range(cfg.num_hidden_layers)),
    )


def embed(p: InternVit, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Embed tiles [b, c, tile, tile] -> [b, 1 + grid², e]."""
    return prepend_class_token(p.class_token, patch_embeddings(p.patch, pixels, cfg)) + position_embeddings(
        p.position[0], cfg
    )


def apply_norm(p: Affine | None, x: Tensor, eps: float) -> Tensor:
    """Normalize x [..., e]: RMS norm if the parameters have no bias, layer norm if they have one, nothing if they are
    None.
    """
    if p is None:
        return x
    return ops.rms_norm(x, p.weight, eps) if p.bias is None else layer_norm(p, x, eps)


def block(p: Layer, x: Tensor, cfg: VisionConfig, apply_linear: LinearFn = linear) -> Tensor:
    """Run one layer: x [b, s, e] -> [b, s, e]."""
    eps = cfg.layer_norm_eps
    q, k, v = apply_linear(p.qkv, apply_norm(p.norm1, x, eps)).chunk(3, dim=-1)  # [b, s, e] each
    q, k = apply_norm(p.q_norm, q, eps), apply_norm(p.k_norm, k, eps)
    x = x + p.scale1 * apply_linear(p.proj, self_attention(q, k, v, cfg.num_attention_heads))
    y = apply_linear(p.fc1, apply_norm(p.norm2, x, eps))
    return x + p.scale2 * apply_linear(p.fc2, ACTIVATIONS[cfg.hidden_act](y))
