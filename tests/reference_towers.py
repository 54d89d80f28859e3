"""The picture towers of transformers under the names of released checkpoints, and how VILA looks through them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from pytest import MonkeyPatch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionModel, InternVLVisionRMSNorm

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 4,
}
SIGLIP = SIZES | {"model_type": "siglip_vision_model", "vision_use_head": False}
CLIP = SIZES | {"model_type": "clip_vision_model"}
INTERN = SIZES | {"model_type": "intern_vit_6b"}
INTERN_300M = INTERN | {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}

INTERN_NAMES = {  # as released -> as in transformers
    r"embeddings\.class_embedding": "embeddings.cls_token",
    r"embeddings\.position_embedding": "embeddings.position_embeddings",
    r"embeddings\.patch_embedding": "embeddings.patch_embeddings.projection",
    r"encoder\.layers\.": "encoder.layer.",
    r"attn\.proj": "attention.projection_layer",
    r"attn\.": "attention.",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"ls(\d)": r"lambda_\1",
}


def intern_names(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InternViT's tensors under transformers' names, its one projection in three."""
    values = {}
    for name, value in released.items():
        for old, new in INTERN_NAMES.items():
            name = re.sub(old, new, name)
        parts = zip("qkv", value.chunk(3)) if "qkv" in name else [("", value)]
        values |= {name.replace("qkv", f"{part}_proj"): x for part, x in parts}
    return values


def theirs(values: Mapping[str, Any], tensors: Mapping[str, Tensor], attention: str = "sdpa") -> nn.Module:
    """The tower of a vision_tower/config.json with the tensors of a checkpoint, in their dtype."""
    model: Any
    kind, how = values["model_type"], {"attn_implementation": attention}
    if kind == "intern_vit_6b":
        qkv_bias, qk_norm = values.get("qkv_bias", False), values.get("qk_normalization", True)
        how |= {"attention_bias": qkv_bias, "use_qk_norm": qk_norm, "norm_type": values.get("norm_type", "rms_norm")}
        size, patch = [values["image_size"]] * 2, [values["patch_size"]] * 2
        how |= {"use_absolute_position_embeddings": True, "image_size": size, "patch_size": patch, "hidden_act": "gelu"}
        model, tensors = InternVLVisionModel(InternVLVisionConfig(**{**values, **how})), intern_names(tensors)
    elif kind == "clip_vision_model":
        model = CLIPVisionModel(CLIPVisionConfig(**{**values, **how}))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**{**values, **how}))
    missing, unexpected = model.to(next(iter(tensors.values())).dtype).eval().load_state_dict(tensors, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


@contextmanager
def exact_norms() -> Iterator[None]:
    """InternVL's RMS norm without its detour through float32, which costs float64 inputs half their digits."""

    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon))

    with MonkeyPatch.context() as patch:
        patch.setattr(InternVLVisionRMSNorm, "forward", forward)
        yield


def features(tower: Any, images: Tensor, top: Mapping[str, Any]) -> Tensor:
    """The selected hidden state of the tower, with the fields of a top config.json; S2 tile by tile."""

    def see(x: Tensor) -> Tensor:
        with exact_norms():
            state = tower(x, output_hidden_states=True).hidden_states[top["mm_vision_select_layer"]]
        return state[:, 1:] if top["mm_vision_select_feature"] == "patch" else state

    if not top.get("s2"):
        return see(images)
    seen = []
    for side in sorted(map(int, top["s2_scales"].split(","))):
        wide = images if images.dtype == torch.float64 else images.float()
        x = F.interpolate(wide, size=(side, side), mode="bicubic").to(images.dtype)
        n = -(-side // top["s2_max_split_size"])
        rows = []
        for band in x.chunk(n, dim=2):
            tiles = [see(tile) for tile in band.chunk(n, dim=3)]
            grid = round(tiles[0].shape[1] ** 0.5)
            rows.append(torch.cat([tile.unflatten(1, (grid, grid)) for tile in tiles], dim=2))
        seen.append(torch.cat(rows, dim=1))  # [b, n·grid, n·grid, e]
    grid = seen[0].shape[1]
    pooled = [x.unflatten(1, (grid, -1)).unflatten(3, (grid, -1)).mean((2, 4)) for x in seen]
    return torch.cat(pooled, dim=-1).flatten(1, 2)
