"""The geometry of the vision tower and the projector, and settings of the top config.json for their use."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from vila_triton.files.reading import short_repr

from .config_fields import (
    Bounds,
    ConfigError,
    Count,
    Epsilon,
    GroupSize,
    LayerCount,
    PixelCount,
    expected_instead,
    quantization_fields,
    read_dataclass,
)

TOWER_DEFAULTS: dict[str, dict[str, Any]] = {  # of fields that a config.json may leave out
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "clip_vision_model": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "intern_vit_6b": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
    },
}
ALLOWED_VALUES = {
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "quick_gelu"),
    "norm_type": ("layer_norm", "rms_norm"),
    "select_feature": ("cls_patch", "patch"),
}
DOWNSAMPLE_FACTORS = {  # patches along one side of a token
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_3x3_s2": 3,
    "mlp_downsample_3x3_s2_new": 3,
}


@dataclass(frozen=True)
class VisionSettings:
    """Fields of the top config.json that say how the tower is used; field names are the file's keys, defaults of S2
    LLaVA-S2's.
    """

    mm_vision_select_layer: Annotated[int, Bounds(-4096, 4096)] = -2
    mm_vision_select_feature: str | None = None  # "patch" for a tower with a class token
    vision_resolution: Annotated[int, Bounds(-1, 4096)] = -1
    interpolate_mode: str = "linear"
    s2: bool = False
    s2_scales: str | list[PixelCount] = "336,672,1008"
    s2_max_split_size: PixelCount = 336


@dataclass(frozen=True)
class VisionConfig:
    """The geometry of a vision tower; names as in Hugging Face's `SiglipVisionConfig`, `CLIPVisionConfig` and
    InternViT's config.

    `select_layer`: the hidden state that is the output, counted as in VILA: -1 is behind the last layer, -2 behind the
    one before.
    `select_feature`: "patch" drops the class token, "cls_patch" keeps it where there is one.
    `resolution`: side in pixels at which the tower is used, if not the trained one.
    `scales`: sides in pixels of S2's scales (Shi et al. 2024), smallest first.
    `group_size`: as in `LlamaConfig`.
    """

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: LayerCount
    num_attention_heads: Count
    image_size: PixelCount
    patch_size: PixelCount
    num_channels: Annotated[int, Bounds(1, 1024)] = 3
    layer_norm_eps: Epsilon = 1e-6
    model_type: str = "siglip_vision_model"
    hidden_act: str = "gelu_pytorch_tanh"
    norm_type: str = "layer_norm"
    qkv_bias: bool = True
    qk_normalization: bool = False
    select_layer: int = -2
    select_feature: str = "cls_patch"
    resolution: PixelCount | None = None
    scales: tuple[int, ...] = ()
    group_size: GroupSize | None = None

    @property
    def tile_size(self) -> int:
        """Side in pixels of a tile, the input of the transformer."""
        return self.resolution or self.image_size

    @property
    def input_size(self) -> int:
        """Side in pixels of an image."""
        return max(self.scales, default=self.tile_size)

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def num_class_tokens(self) -> int:
        """Positions of the transformer that are not patches: 0 or 1."""
        return 0 if self.model_type == "siglip_vision_model" else 1

    @property
    def num_features(self) -> int:
        """Feature vectors of one image."""
        return self.patches_per_side**2 + (self.num_class_tokens if self.select_feature == "cls_patch" else 0)

    @property
    def feature_dim(self) -> int:
        """Length of a feature vector: the scales' hidden states are concatenated."""
        return self.hidden_size * max(1, len(self.scales))

    def describe(self) -> str:
        """Describe the features in one line."""
        selection = "patches" if self.num_features == self.patches_per_side**2 else "class token and patches"
        scales = f", S2 at {', '.join(map(str, self.scales))}" if self.scales else ""
        return (
            f"{self.model_type}: {self.patches_per_side} x {self.patches_per_side} {selection} of {self.tile_size} "
            f"pixels{scales}, "
            f"hidden state {self.select_layer} of {self.num_hidden_layers} layers"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], top: Mapping[str, Any] | None = None) -> "VisionConfig":
        """Read vision_tower/config.json and, from the top config.json, the fields of `VisionSettings`. Errors:
        `ConfigError`.
        """
        top, model_type = top or {}, values.get("model_type")
        if not isinstance(model_type, str) or model_type not in TOWER_DEFAULTS:
            raise ConfigError(
                f"vision_tower: {short_repr(model_type)} is not supported ({', '.join(TOWER_DEFAULTS)} are)"
            )
        present = {key: value for key, value in values.items() if value is not None} | quantization_fields(
            values, "vision_tower"
        )
        tower = read_dataclass(
            cls, {**TOWER_DEFAULTS[model_type], **present, "scales": None, "resolution": None}, "vision_tower"
        )
        settings = read_dataclass(VisionSettings, top, "config")
        cfg = replace(
            tower,
            select_layer=settings.mm_vision_select_layer,
            select_feature=settings.mm_vision_select_feature or ("patch" if tower.num_class_tokens else "cls_patch"),
            resolution=None if settings.vision_resolution in (-1, tower.image_size) else settings.vision_resolution,
        )
        cfg.check(settings, top)
        return replace(cfg, scales=s2_scales(settings, cfg)) if settings.s2 else cfg

    def check(self, settings: "VisionSettings", top: Mapping[str, Any]) -> None:
        """Errors: `ConfigError` for values that are not supported or do not go together."""
        for name, allowed in ALLOWED_VALUES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(
                    f"vision_tower: {name} {short_repr(value)} is not supported ({', '.join(allowed)} are)"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_tower: hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads"
            )
        if not -self.num_hidden_layers <= self.select_layer < 0:
            raise ConfigError(
                f"vision_tower: mm_vision_select_layer {self.select_layer} of {self.num_hidden_layers} layers; "
                f"it must be -1 to -{self.num_hidden_layers}"
            )
        if (side := min(self.tile_size, self.image_size)) < self.patch_size:
            raise ConfigError(f"vision_tower: a patch of {self.patch_size} is more than a side of {side} pixels")
        if self.select_feature == "patch" and not self.num_class_tokens:
            raise ConfigError(
                f"config: mm_vision_select_feature 'patch' drops the class token, and {self.model_type} has none: it "
                f"would lose the top left patch; it must be 'cls_patch'"
            )
        if self.resolution is not None and (mode := settings.interpolate_mode) != "linear":
            raise ConfigError(f"config: interpolate_mode {short_repr(mode)} is not supported (linear is)")
        for name in ("dynamic_s2", "ps3", "s2_resize_output_to_scale_idx"):
            if top.get(name):
                raise ConfigError(f"config: {name} {short_repr(top[name])} is not supported")


def s2_scales(settings: VisionSettings, tower: VisionConfig) -> tuple[int, ...]:
    """The sides of the S2 scales, smallest first. Errors: `ConfigError` for a scale that is not a whole number of
    tiles.
    """
    raw_scales, max_tile_size = settings.s2_scales, settings.s2_max_split_size
    try:
        scales = tuple(sorted(map(int, raw_scales.split(",") if isinstance(raw_scales, str) else raw_scales)))
    except ValueError:
        raise ConfigError(f"config: s2_scales is {short_repr(raw_scales)}, expected sizes as '384,768'") from None
    if not 1 <= len(scales) <= 16 or any(expected_instead(PixelCount, x) for x in scales):
        raise ConfigError(
            f"config: s2_scales is {short_repr(raw_scales)}, expected up to 16 sizes, each "
            f"{expected_instead(PixelCount, None)}"
        )
    for scale in scales:
        n = math.ceil(scale / max_tile_size)
        if scale != n * tower.tile_size:
            raise ConfigError(
                f"config: a side of {scale} (s2_scales) in tiles of at most {max_tile_size} (s2_max_split_size) makes "
                f"{n} tiles of {scale / n:g} pixels, but the tower takes {tower.tile_size}"
            )
    if tower.num_features != tower.patches_per_side**2:
        raise ConfigError("config: s2 needs a square of patches; mm_vision_select_feature must be 'patch'")
    return scales


@dataclass(frozen=True)
class ProjectorConfig:
    """The geometry of the projector; the types are VILA's and LLaVA's.

    `token_order`: the order of image tokens of `mlp_downsample`: "column" (also if None) in VILA 1.5, "row" in later
    releases. Their configs look alike, so the mm_projector/config.json of a later checkpoint needs `"token_order":
    "row"`.
    `group_size`: as in `LlamaConfig`.
    """

    mm_projector_type: str
    mm_hidden_size: Count
    hidden_size: Count
    token_order: Literal["column", "row"] | None = None
    group_size: GroupSize | None = None

    def __post_init__(self) -> None:
        projector_type = self.mm_projector_type
        if projector_type not in (*DOWNSAMPLE_FACTORS, "identity", "linear") and not self.num_linears:
            names = ", ".join(("identity", "linear", "mlp{N}x_gelu", *DOWNSAMPLE_FACTORS))
            raise ConfigError(
                f"mm_projector: mm_projector_type {short_repr(projector_type)} is not supported ({names} are)"
            )
        if self.token_order and projector_type != "mlp_downsample" and self.token_order != "row":
            raise ConfigError(
                f"mm_projector: {projector_type} takes its tokens along the rows, not by {self.token_order}"
            )
        if projector_type == "identity" and self.mm_hidden_size != self.hidden_size:
            raise ConfigError(f"mm_projector: identity from {self.mm_hidden_size} to {self.hidden_size} numbers")

    @property
    def num_linears(self) -> int:
        """The number of linear maps of an `mlp{N}x_gelu`; 0 for the other types."""
        match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", self.mm_projector_type)
        return int(match[1]) if match else 0

    @property
    def downsample_factor(self) -> int:
        """Patches along one side of the square that becomes one token."""
        return DOWNSAMPLE_FACTORS.get(self.mm_projector_type, 1)

    @property
    def effective_token_order(self) -> str:
        """ "column" if the tokens follow the columns of the image, "row" if they follow its rows."""
        return self.token_order or ("column" if self.mm_projector_type == "mlp_downsample" else "row")

    def describe(self) -> str:
        """Describe the type in one line, with the order of its tokens where there is a choice."""
        reason = "as the config says" if self.token_order else "as released; token_order would say otherwise"
        order = (
            f", tokens in {self.effective_token_order} order ({reason})"
            if self.mm_projector_type == "mlp_downsample"
            else ""
        )
        return f"{self.mm_projector_type}{order}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProjectorConfig":
        """Read mm_projector/config.json together with the widths in the top config.json. Errors: `ConfigError`."""
        return read_dataclass(cls, {**values, **quantization_fields(values, "mm_projector")}, "mm_projector")
