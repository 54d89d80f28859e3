"""The picture tower: a vision transformer as pure functions over a tree of parameters, one tree a kind."""

from typing import Any

import torch
from torch import Tensor

from . import vision_clip, vision_internvit, vision_siglip
from .config import VisionConfig
from .vision_clip import Clip
from .vision_internvit import InternVit
from .vision_s2 import cut, look, side_by_side
from .vision_siglip import Siglip

Tower = Siglip | Clip | InternVit
KINDS: dict[str, Any] = {
    "siglip_vision_model": vision_siglip,
    "clip_vision_model": vision_clip,
    "intern_vit_6b": vision_internvit,
}


def declare(cfg: VisionConfig, dtype: torch.dtype) -> Tower:
    """The tree of a tower."""
    return KINDS[cfg.model_type].declare(cfg, dtype)


def vision_tower(p: Tower, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Pictures [b, c, H, W] -> the features that the config selects, [b, features, width].

    Errors: ValueError for pictures of another size.
    """
    expected = (cfg.num_channels, cfg.input_size, cfg.input_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
        raise ValueError(
            f"images have shape {list(pixels.shape)}, expected [pictures, {', '.join(map(str, expected))}]"
        )
    found = [features(p, x, cfg) for x in tiles(pixels, cfg)]
    return side_by_side(found, [side // cfg.tile for side in cfg.scales]) if cfg.scales else found[0]


def tiles(pixels: Tensor, cfg: VisionConfig) -> list[Tensor]:
    """What the transformer sees of pictures [b, c, H, W]: for each scale, or once, [b · tiles, c, tile, tile]."""
    return [cut(look(pixels, side), side // cfg.tile) for side in cfg.scales] or [pixels]


def features(p: Tower, pixels: Tensor, cfg: VisionConfig) -> Tensor:
    """Tiles [b, c, tile, tile] -> the selected hidden state [b, features, e]."""
    kind = KINDS[cfg.model_type]
    x = kind.embed(p, pixels, cfg)
    for layer in p.layers[: len(p.layers) + 1 + cfg.select_layer]:
        x = kind.block(layer, x, cfg)
    return x[:, cfg.class_tokens :] if cfg.select_feature == "patch" else x
