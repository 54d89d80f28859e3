"""The geometry of the whole model and of the language model, read strictly from a checkpoint's config.json files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vila_triton.console import note_new_spelling
from vila_triton.files.reading import short_repr

from .config_fields import (
    Bounds,
    ConfigError,
    Count,
    Epsilon,
    GroupSize,
    LayerCount,
    PositiveFactor,
    nested_object,
    quantization_fields,
    read_dataclass,
)
from .vision_config import ProjectorConfig, VisionConfig

__all__ = [
    "ConfigError",
    "LlamaConfig",
    "ProjectorConfig",
    "RopeScaling",
    "VilaConfig",
    "VisionConfig",
    "read_dataclass",
]


@dataclass(frozen=True)
class RopeScaling:
    """Stretches the rotary frequencies beyond the trained context: `linear` (Chen et al. 2023) or `llama3` (Llama 3.1,
    2024).
    """

    rope_type: Literal["linear", "llama3"]
    factor: PositiveFactor
    low_freq_factor: PositiveFactor = 1.0
    high_freq_factor: PositiveFactor = 4.0
    original_max_position_embeddings: Count = 8192

    def __post_init__(self) -> None:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"llm rope_scaling: low_freq_factor is {self.low_freq_factor}, expected less than high_freq_factor, "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """The geometry of the language model; names as in Hugging Face's `LlamaConfig`.

    `group_size`: None for floating-point linears, else the inputs that share a scale in int4 linears, -1 for all inputs
    of a linear.
    `rounding`: where dequantization rounds, see `Int4`. `dense_linears`: names of linears that are not int4 all the
    same.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: LayerCount
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Annotated[float, Bounds(0, 1e18, exclusive=True)] = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: Count = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    group_size: GroupSize | None = None
    rounding: Literal["sub", "fma"] = "sub"
    dense_linears: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read llm/config.json, in the spelling of transformers 4 (rope_theta) or 5 (rope_parameters). Errors:
        `ConfigError`.
        """
        v = dict(values)
        for name, expected in (("model_type", "llama"), ("hidden_act", "silu")):
            if v.get(name) not in (None, expected):
                raise ConfigError(f"llm: {name} is {short_repr(v[name])}, expected {expected!r}")
        heads = v.get("num_attention_heads")
        if v.get("num_key_value_heads") is None:
            v["num_key_value_heads"] = heads
        if v.get("head_dim") is None and isinstance(v.get("hidden_size"), int) and isinstance(heads, int) and heads > 0:
            v["head_dim"] = v["hidden_size"] // heads
        rope = nested_object(v, "rope_scaling", "llm") | nested_object(v, "rope_parameters", "llm")
        theta = rope.get("rope_theta")
        v["rope_theta"] = v.get("rope_theta") if theta is None else theta
        v["rope_scaling"] = None
        rope_type = rope.get("rope_type") or rope.get("type")
        if rope_type is None and (other_keys := sorted(rope.keys() - {"rope_theta", "rope_type", "type"})):
            raise ConfigError(
                f"llm: rope_scaling has {', '.join(other_keys)}, but no rope_type, expected linear or llama3"
            )
        rope_type = rope_type or "default"
        if rope_type not in ("default", "linear", "llama3"):
            raise ConfigError(
                f"llm: rope_scaling {short_repr(rope_type)} is not supported (default, linear, llama3 are)"
            )
        if rope_type != "default":
            v["rope_scaling"] = read_dataclass(RopeScaling, {**rope, "rope_type": rope_type}, "llm rope_scaling")
        cfg = read_dataclass(cls, {**v, **quantization_fields(v, "llm", ("sub", "fma"))}, "llm")
        if cfg.head_dim % 2:
            raise ConfigError(f"llm: head_dim is {cfg.head_dim}, expected an even number: rotary angles turn pairs")
        if cfg.num_attention_heads % cfg.num_key_value_heads:
            raise ConfigError(
                f"llm: {cfg.num_attention_heads} heads are not a multiple of {cfg.num_key_value_heads} key/value heads"
            )
        return cfg


Dtype = Literal["float16", "bfloat16", "float32", "float64"]
TokenId = Annotated[int, Bounds(0, 2**31 - 1)]


@dataclass(frozen=True)
class RunSettings:
    """Settings in the top config.json that are not geometry: how the model is run and prompted. Field names are the
    file's keys.
    """

    prefill_chunk_size: Count = 512
    page_size: Annotated[int, Bounds(1, 1024)] = 16
    kv_dtype: Literal["float32", "float16", "bfloat16", "int8", "int4"] | None = None
    attention_numerics: Literal["fast", "batch_invariant"] = "fast"
    num_video_frames: Annotated[int, Bounds(1, 1024)] = 8
    model_dtype: str | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    use_cache: bool = True
    return_dict: bool = True
    output_attentions: bool = False
    output_hidden_states: bool = False
    conversation_template: str | None = None
    image_aspect_ratio: Literal["resize", "pad", "square"] | None = None


def with_new_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The top config, `attention_policy` and its value "invariant" under their new names; a note on stderr says so."""
    config = dict(config)
    if "attention_policy" in config:
        note_new_spelling("attention_policy in config.json", "attention_numerics")
        config["attention_numerics"] = config.pop("attention_policy")
    if config.get("attention_numerics") == "invariant":
        note_new_spelling('attention_numerics "invariant" in config.json', '"batch_invariant"')
        config["attention_numerics"] = "batch_invariant"
    return config


@dataclass(frozen=True)
class TokenSettings:
    """Settings about tokens in llm/config.json. Field names are the file's keys."""

    eos_token_id: TokenId | list[TokenId] | None = None
    tokenizer_model_max_length: Annotated[int, Bounds(1, 2**128)] | None = None
    tokenizer_padding_side: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        if self.eos_token_id == []:
            raise ConfigError("llm: eos_token_id is [], expected a token, or a list of some")


@dataclass(frozen=True)
class VilaConfig:
    """The geometry of the whole model. Errors: `ConfigError` if the widths of its parts do not fit together."""

    llm: LlamaConfig
    vision_tower: VisionConfig
    mm_projector: ProjectorConfig

    def __post_init__(self) -> None:
        tower, projector = self.vision_tower, self.mm_projector
        for name, actual, required in (
            ("mm_hidden_size", projector.mm_hidden_size, tower.feature_dim),
            ("hidden_size", projector.hidden_size, self.llm.hidden_size),
        ):
            if actual != required:
                raise ConfigError(f"mm_projector: {name} is {actual}, but the part it joins is {required} wide")
        if projector.downsample_factor > 1 and tower.num_features != tower.patches_per_side**2:
            raise ConfigError(
                f"mm_projector: {projector.mm_projector_type} needs a square of patches, but 'cls_patch' of "
                f"{tower.model_type} keeps the class token; mm_vision_select_feature must be 'patch'"
            )

    @property
    def tokens_per_image(self) -> int:
        """Positions that one image takes in the language model."""
        side = self.mm_projector.downsample_factor
        return self.vision_tower.num_features if side == 1 else (-(-self.vision_tower.patches_per_side // side)) ** 2

    def describe(self) -> str:
        """Describe the vision tower and the projector in two lines, defaults included."""
        return (
            f"{self.vision_tower.describe()}\n{self.mm_projector.describe()}; {self.tokens_per_image} tokens an image"
        )
