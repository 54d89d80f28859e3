"""The vision tower: dispatches to the SigLIP, CLIP or InternViT of the config, and runs it at the scales of S2."""

from typing import Any

import torch
from torch import Tensor

from . import vision_clip, vision_internvit, vision_siglip
from .checkpointing import layer_runner
from .config import VisionConfig
from .vision_clip import Clip
from .vision_internvit import InternVit
from .vision_s2 import merge_scales, resize_to_scale, split_into_tiles
from .vision_siglip import Siglip

Tower = Siglip | Clip | InternVit
TOWER_MODULES: dict[str, Any] = {
    "siglip_vision_model": vision_siglip,
    "clip_vision_model": vision_clip,
    "intern_vit_6b": vision_internvit,
}


def param_specs(cfg: VisionConfig, dtype: torch.dtype) -> Tower:
    """Specs of the tower that the config describes."""
    return TOWER_MODULES[cfg.model_type].param_specs(cfg, dtype)


def forward(p: Tower, pixels: Tensor, cfg: VisionConfig, checkpointing: bool = False) -> Tensor:
    """Run the tower: images [b, c, H, W] -> the features that the config selects, [b, features, feature_dim]. With
    `checkpointing` a backward pass runs every layer anew.

    Errors: ValueError for images of another size.
    """
    expected = (cfg.num_channels, cfg.input_size, cfg.input_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
        raise ValueError(f"images have shape {list(pixels.shape)}, expected [images, {', '.join(map(str, expected))}]")
    scale_features = [select_hidden_state(p, x, cfg, checkpointing) for x in to_tiles(pixels, cfg)]
    if not cfg.scales:
        return scale_features[0]
    return merge_scales(scale_features, [side // cfg.tile_size for side in cfg.scales])


def to_tiles(pixels: Tensor, cfg: VisionConfig) -> list[Tensor]:
    """Resize and cut images [b, c, H, W] for the transformer -> for each S2 scale, or once, tiles [b · tiles, c, tile,
    tile].
    """
    return [split_into_tiles(resize_to_scale(pixels, side), side // cfg.tile_size) for side in cfg.scales] or [pixels]


def select_hidden_state(p: Tower, pixels: Tensor, cfg: VisionConfig, checkpointing: bool = False) -> Tensor:
    """Run the layers of the transformer up to the hidden state that the config selects: tiles [b, c, tile, tile] -> [b,
    features, e].
    """
    module = TOWER_MODULES[cfg.model_type]
    x, run_layer = module.embed(p, pixels, cfg), layer_runner(module.block, checkpointing)
    for layer in p.layers[: len(p.layers) + 1 + cfg.select_layer]:
        x = run_layer(layer, x, cfg)
    return x[:, cfg.num_class_tokens :] if cfg.select_feature == "patch" else x
