"""InternViT (Chen et al. 2023): one projection to queries, keys and values, RMS norms, QK-norm, layer scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vila_triton import ops

from .config import VisionConfig
from .layers import Affine, Leaf, Linear, declare_linear, declare_norm, layer_norm, linear
from .params import Spec
from .vision_layers import ACTIVATIONS, attend, declare_patch, patches, positions, trained_positions, with_class_token


@dataclass(frozen=True)
class Layer:
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
    patch: Affine  # weight [e, c, patch, patch]
    class_token: Leaf  # [1, 1, e]
    position: Leaf  # [1, 1 + grid², e]
    layers: tuple[Layer, ...]


def declare_rms_norm(e: int, key: str, dtype: torch.dtype) -> Affine:
    return Affine(Spec((e,), f"{key}.weight", dtype, "ones"), None)


def declare(cfg: VisionConfig, dtype: torch.dtype) -> InternVit:
    """The tree of a tower, its leaves named as in the released InternViT-6B."""
    e, f = cfg.hidden_size, cfg.intermediate_size
    norm = declare_rms_norm if cfg.norm_type == "rms_norm" else declare_norm

    def dense(n: int, k: int, key: str, bias: bool = True) -> Affine:
        return declare_linear(n, k, key, dtype, bias, cfg.group_size)

    def layer(i: int) -> Layer:
        at = f"encoder.layers.{i}"
        return Layer(
            norm(e, f"{at}.norm1", dtype),
            dense(3 * e, e, f"{at}.attn.qkv", cfg.qkv_bias),
            declare_rms_norm(e, f"{at}.attn.q_norm", dtype) if cfg.qk_normalization else None,
            declare_rms_norm(e, f"{at}.attn.k_norm", dtype) if cfg.qk_normalization else None,
            dense(e, e, f"{at}.attn.proj"),
            Spec((e,), f"{at}.ls1", dtype, "ones"),
            norm(e, f"{at}.norm2", dtype),
            dense(f, e, f"{at}.mlp.fc1"),
            dense(e, f, f"{at}.mlp.fc2"),
            Spec((e,), f"{at}.ls2", dtype, "ones"),
        )

    return InternVit(
        declare_patch(cfg, dtype),
        Spec((1, 1, e), "embeddings.class_embedding", dtype),
        Spec((1, trained_positions(cfg), e), "embeddings.position_embedding", dtype),
        tuple(layer(i) for i in range(cfg.num_hidden_layers)),
    )


def embed(p: InternVit, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Tiles [b, c, tile, tile] -> [b, 1 + grid², e]."""
    return with_class_token(p.class_token, patches(p.patch, pixels, cfg)) + positions(p.position[0], cfg)


def norm(p: Affine | None, x: Tensor, eps: float) -> Tensor:
    """The norm that the parameters are of: an RMS norm has no bias; None leaves x [..., e] as it is."""
    if p is None:
        return x
    return ops.rms_norm(x, p.weight, eps) if p.bias is None else layer_norm(p, x, eps)


def block(p: Layer, x: Tensor, cfg: VisionConfig, linear: Linear = linear) -> Tensor:
    """One layer: x [b, s, e] -> [b, s, e]."""
    eps = cfg.layer_norm_eps
    q, k, v = linear(p.qkv, norm(p.norm1, x, eps)).chunk(3, dim=-1)  # [b, s, e] each
    q, k = norm(p.q_norm, q, eps), norm(p.k_norm, k, eps)
    x = x + p.scale1 * linear(p.proj, attend(q, k, v, cfg.num_attention_heads))
    y = linear(p.fc1, norm(p.norm2, x, eps))
    return x + p.scale2 * linear(p.fc2, ACTIVATIONS[cfg.hidden_act](y))
