"""Geometry of the three parts, read strictly from the dictionaries of a checkpoint's config.json files."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A config.json says something this code does not know how to honour."""


def read(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from the entries of `values` that it declares; null counts as absent. Errors: `ConfigError`."""
    known = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}  # pyright: ignore
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]  # pyright: ignore
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    for f in fields(cls):  # pyright: ignore
        value, whole = known.get(f.name), f.type in (int, int | None)
        if value is None or not (whole or f.type is float):
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ConfigError(f"{where}: {f.name} is {value!r}, expected a {'whole ' if whole else ''}number")
        if whole and value < 1 and f.name != "select_layer":
            raise ConfigError(f"{where}: {f.name} is {value}, expected at least 1")
    return cls(**known)


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
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise ConfigError(f"llm: rope_scaling {kind!r} is not supported (default, linear, llama3 are)")
        if kind != "default":
            v["rope_scaling"] = read(RopeScaling, {**rope, "rope_type": kind}, "llm rope_scaling")
        quantization = v.get("quantization_config")
        if quantization:
            if quantization.get("quant_method") != "vila-triton":
                raise ConfigError(f"llm: quantization {quantization.get('quant_method')!r} is not supported")
            if not quantization.get("group_size"):
                raise ConfigError("llm quantization_config: missing group_size")
            v["group_size"], v["order"] = quantization["group_size"], quantization.get("order") or "sub"
            if v["order"] not in ("sub", "fma"):
                raise ConfigError(f"llm quantization_config: order is {v['order']!r}, expected 'sub' or 'fma'")
        cfg = read(cls, v, "llm")
        if cfg.num_attention_heads % cfg.num_key_value_heads:
            raise ConfigError(
                f"llm: {cfg.num_attention_heads} heads are not a multiple of {cfg.num_key_value_heads} key/value heads"
            )
        return cfg


@dataclass(frozen=True)
class VisionConfig:
    """The picture tower; names as in Hugging Face's `SiglipVisionConfig`.

    `select_layer` counts hidden states as VILA does: -1 is the output of the last layer, -2 of the one before.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    select_layer: int = -2

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], select_layer: int = -2) -> "VisionConfig":
        """From vision_tower/config.json. Errors: `ConfigError` for a tower other than SigLIP's."""
        kind, act = values.get("model_type"), values.get("hidden_act", "gelu_pytorch_tanh")
        if kind != "siglip_vision_model" or act != "gelu_pytorch_tanh":
            raise ConfigError(f"vision_tower: {kind!r} with {act!r} is not supported (siglip_vision_model is)")
        cfg = read(cls, {**values, "select_layer": select_layer}, "vision_tower")
        if cfg.hidden_size % cfg.num_attention_heads:
            raise ConfigError(
                f"vision_tower: hidden_size {cfg.hidden_size} is not a multiple of {cfg.num_attention_heads} heads"
            )
        if not -cfg.num_hidden_layers <= cfg.select_layer < 0:
            raise ConfigError(
                f"vision_tower: mm_vision_select_layer {select_layer} of {cfg.num_hidden_layers} layers; "
                f"it must be -1 to -{cfg.num_hidden_layers}"
            )
        return cfg


@dataclass(frozen=True)
class ProjectorConfig:
    """Vision features to language model width. `token_order` of VILA 1.5 is "column", of later releases "row"."""

    mm_projector_type: str
    mm_hidden_size: int
    hidden_size: int
    token_order: Literal["column", "row"] = "column"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProjectorConfig":
        """From mm_projector/config.json together with the widths of the top config.json."""
        cfg = read(cls, values, "mm_projector")
        if cfg.mm_projector_type != "mlp_downsample":
            raise ConfigError(f"mm_projector: {cfg.mm_projector_type!r} is not supported (mlp_downsample is)")
        if cfg.token_order not in ("column", "row"):
            raise ConfigError(f"mm_projector: token_order is {cfg.token_order!r}, expected 'column' or 'row'")
        return cfg


@dataclass(frozen=True)
class VilaConfig:
    """The whole model."""

    llm: LlamaConfig
    vision_tower: VisionConfig
    mm_projector: ProjectorConfig

    def __post_init__(self) -> None:
        for name, got, want in (
            ("mm_hidden_size", self.mm_projector.mm_hidden_size, self.vision_tower.hidden_size),
            ("hidden_size", self.mm_projector.hidden_size, self.llm.hidden_size),
        ):
            if got != want:
                raise ConfigError(f"mm_projector: {name} is {got}, but the part it joins is {want} wide")

    @property
    def image_tokens(self) -> int:
        """Positions one picture takes in the language model."""
        return (-(-self.vision_tower.grid // 2)) ** 2
