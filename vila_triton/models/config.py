"""Geometry of the model and its language part, read strictly from a checkpoint's config.json files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .fields import ConfigError, int4_fields, read
from .vision_config import ProjectorConfig, VisionConfig

__all__ = ["ConfigError", "LlamaConfig", "ProjectorConfig", "RopeScaling", "VilaConfig", "VisionConfig", "read"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context: `linear` (Chen 2023) or `llama3` (Meta 2024)."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The language model; names as in Hugging Face's `LlamaConfig`. `group_size` set means int4 linears, `order` then
    says where their weights are rounded (`Int4.order`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    group_size: int | None = None
    order: Literal["sub", "fma"] = "sub"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """From llm/config.json, in the spelling of transformers 4 (rope_theta) or 5 (rope_parameters)."""
        v = dict(values)
        if v.get("model_type", "llama") != "llama" or v.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"llm: a silu llama is needed, not {v.get('hidden_act')} {v.get('model_type')}")
        heads = v.get("num_attention_heads")
        v["num_key_value_heads"] = v.get("num_key_value_heads") or heads
        if not v.get("head_dim") and isinstance(v.get("hidden_size"), int) and isinstance(heads, int) and heads > 0:
            v["head_dim"] = v["hidden_size"] // heads
        if not all(isinstance(v.get(name) or {}, dict) for name in ("rope_scaling", "rope_parameters")):
            raise ConfigError("llm: rope_scaling and rope_parameters must be objects")
        rope = {**(v.get("rope_scaling") or {}), **(v.get("rope_parameters") or {})}
        v["rope_theta"] = rope.get("rope_theta") or v.get("rope_theta")
        v["rope_scaling"] = None
        kind = rope.get("rope_type") or rope.get("type")
        if kind is None and (scaled := sorted(rope.keys() - {"rope_theta", "rope_type", "type"})):
            raise ConfigError(f"llm: rope_scaling has {', '.join(scaled)}, but no rope_type, expected linear or llama3")
        kind = kind or "default"
        if kind not in ("default", "linear", "llama3"):
            raise ConfigError(f"llm: rope_scaling {kind!r} is not supported (default, linear, llama3 are)")
        if kind != "default":
            v["rope_scaling"] = read(RopeScaling, {**rope, "rope_type": kind}, "llm rope_scaling")
        cfg = read(cls, {**v, **int4_fields(v, "llm", ("sub", "fma"))}, "llm")
        if cfg.num_attention_heads % cfg.num_key_value_heads:
            raise ConfigError(
                f"llm: {cfg.num_attention_heads} heads are not a multiple of {cfg.num_key_value_heads} key/value heads"
            )
        return cfg


@dataclass(frozen=True)
class VilaConfig:
    """The whole model."""

    llm: LlamaConfig
    vision_tower: VisionConfig
    mm_projector: ProjectorConfig

    def __post_init__(self) -> None:
        tower, projector = self.vision_tower, self.mm_projector
        for name, got, want in (
            ("mm_hidden_size", projector.mm_hidden_size, tower.width),
            ("hidden_size", projector.hidden_size, self.llm.hidden_size),
        ):
            if got != want:
                raise ConfigError(f"mm_projector: {name} is {got}, but the part it joins is {want} wide")
        if projector.side > 1 and tower.features != tower.grid**2:
            raise ConfigError(
                f"mm_projector: {projector.mm_projector_type} needs a square of patches, but 'cls_patch' of "
                f"{tower.model_type} keeps the class token; mm_vision_select_feature must be 'patch'"
            )

    @property
    def image_tokens(self) -> int:
        """Positions one picture takes in the language model."""
        side = self.mm_projector.side
        return self.vision_tower.features if side == 1 else (-(-self.vision_tower.grid // side)) ** 2

    def report(self) -> str:
        """How a picture is seen, in two lines: what was chosen by the config, defaults included."""
        return f"{self.vision_tower.report()}\n{self.mm_projector.report()}; {self.image_tokens} tokens a picture"
