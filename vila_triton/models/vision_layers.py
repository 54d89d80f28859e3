"""Layers that all vision towers share: patch and position embeddings, the class token, bidirectional attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vila_triton import ops

from .config import VisionConfig
from .layers import Affine
from .params import ParameterSpec


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), CLIP's approximation of GELU (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


def gelu_pytorch_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, under Hugging Face's name for it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_pytorch_tanh,
    "quick_gelu": quick_gelu,
}


def patch_specs(cfg: VisionConfig, dtype: torch.dtype, bias: bool = True) -> Affine:
    """Specs of the linear map from a patch to its embedding, stored as a convolution: weight [e, c, patch, patch]."""
    key, e, size = "embeddings.patch_embedding", cfg.hidden_size, cfg.patch_size
    weight = ParameterSpec((e, cfg.num_channels, size, size), f"{key}.weight", dtype)
    return Affine(weight, ParameterSpec((e,), f"{key}.bias", dtype, "zeros") if bias else None)


def num_trained_positions(cfg: VisionConfig) -> int:
    """The number of position embeddings in the checkpoint."""
    return cfg.num_class_tokens + (cfg.image_size // cfg.patch_size) ** 2


def patch_embeddings(p: Affine, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Embed the patches of tiles [b, c, tile, tile], row by row -> [b, grid², e]."""
    size, side = cfg.patch_size, cfg.patches_per_side * cfg.patch_size  # pixels beyond whole patches are dropped
    x = rearrange(pixels[..., :side, :side], "b c (y p) (x q) -> b (y x) (c p q)", p=size, q=size)
    return ops.linear(x, p.weight.flatten(1), p.bias)


def position_embeddings(trained: Tensor, cfg: VisionConfig) -> Tensor:
    """Resample trained position embeddings to the grid in use: [class tokens + trained grid², e] -> [class tokens +
    grid², e].

    For a `vision_resolution` other than the trained one, VILA stretches the sequence of patches linearly: patch i of n
    lies at i (m - 1) / (n - 1) of the m trained embeddings, across the ends of rows. Two differences from upstream,
    whose results cannot be
    used: a position that is a whole number takes that embedding (upstream both of its weights are 0), and the class
    token keeps its own (upstream it counts as a patch, and one is then missing).
    """
    if cfg.tile_size == cfg.image_size:
        return trained
    first, grid = trained[: cfg.num_class_tokens], trained[cfg.num_class_tokens :]
    n, m = cfg.patches_per_side**2, len(grid)
    scaled_index = torch.arange(n, device=grid.device) * (m - 1)  # in steps of 1 / (n - 1): whole numbers stay whole
    lower = scaled_index // max(n - 1, 1)
    fraction = ((scaled_index % max(n - 1, 1)).double() / max(n - 1, 1))[:, None].to(grid.dtype)
    return torch.cat((first, torch.lerp(grid[lower], grid[(lower + 1).clamp(max=m - 1)], fraction)))


def prepend_class_token(token: Tensor, x: Tensor) -> Tensor:
    """Prepend the class token to patch embeddings: [b, grid², e] -> [b, 1 + grid², e]."""
    return torch.cat((token.expand(len(x), 1, -1), x), dim=1)


def self_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Bidirectional attention within each tile: q, k and v [b, s, e] -> [b, s, e]."""
    q, k, v = (rearrange(x, "b s (h d) -> b s h d", h=num_heads) for x in (q, k, v))
    return rearrange(ops.encoder_attention(q, k, v, q.shape[-1] ** -0.5), "b s h d -> b s (h d)")
