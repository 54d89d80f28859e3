"""The LLaMA decoder (Touvron et al. 2023) as pure functions over a tree of parameters.

Tokens of all sequences lie end to end: x [s, e]. What came before is behind `cache`, which is asked once a layer.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from vila_triton import ops
from vila_triton.ops import Int4, int4_swiglu, rms_norm, swiglu

from .config import LlamaConfig
from .layers import Affine, Leaf, linear, linear_specs
from .params import ParameterSpec

CosSin = tuple[Tensor, Tensor]  # cosine and sine of the rotary angles of the new tokens, [s, r] float32 each


class AttentionBackend(Protocol):
    """What attention needs of the past: it keeps the new keys and values and answers the new queries."""

    @property
    def numerics(self) -> str:
        """ "fast" or "invariant", see `ops.attention`."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        """q [s, h, d], k and v [s, g, d] of the new tokens, q and k not yet turned -> [s, h, d]."""
        ...


@dataclass(frozen=True)
class Layer:
    attention_norm: Leaf  # [e]
    q: Affine  # [h·d, e]
    k: Affine  # [g·d, e]
    v: Affine  # [g·d, e]
    o: Affine  # [e, h·d]
    mlp_norm: Leaf  # [e]
    gate: Affine  # [f, e]
    up: Affine  # [f, e]
    down: Affine  # [e, f]


@dataclass(frozen=True)
class Llama:
    embedding: Leaf  # [v, e]
    layers: tuple[Layer, ...]
    norm: Leaf  # [e]
    head: Leaf | None  # [v, e]; None: the embedding serves as head too


def param_specs(cfg: LlamaConfig, dtype: torch.dtype) -> Llama:
    """The tree of a model, its leaves named as in Hugging Face's `LlamaForCausalLM`."""
    e, f, d = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    h, g = cfg.num_attention_heads, cfg.num_key_value_heads

    def linear_spec(n: int, k: int, key: str, bias: bool) -> Affine:
        return linear_specs(n, k, key, dtype, bias, None if key in cfg.dense_linears else cfg.group_size, cfg.rounding)

    def norm_spec(key: str) -> ParameterSpec:
        return ParameterSpec((e,), f"{key}.weight", dtype, "ones")

    def layer_specs(i: int) -> Layer:
        prefix = f"model.layers.{i}"
        return Layer(
            norm_spec(f"{prefix}.input_layernorm"),
            linear_spec(h * d, e, f"{prefix}.self_attn.q_proj", cfg.attention_bias),
            linear_spec(g * d, e, f"{prefix}.self_attn.k_proj", cfg.attention_bias),
            linear_spec(g * d, e, f"{prefix}.self_attn.v_proj", cfg.attention_bias),
            linear_spec(e, h * d, f"{prefix}.self_attn.o_proj", cfg.attention_bias),
            norm_spec(f"{prefix}.post_attention_layernorm"),
            linear_spec(f, e, f"{prefix}.mlp.gate_proj", cfg.mlp_bias),
            linear_spec(f, e, f"{prefix}.mlp.up_proj", cfg.mlp_bias),
            linear_spec(e, f, f"{prefix}.mlp.down_proj", cfg.mlp_bias),
        )

    return Llama(
        ParameterSpec((cfg.vocab_size, e), "model.embed_tokens.weight", dtype),
        tuple(layer_specs(i) for i in range(cfg.num_hidden_layers)),
        norm_spec("model.norm"),
        None if cfg.tie_word_embeddings else ParameterSpec((cfg.vocab_size, e), "lm_head.weight", dtype),
    )


def inverse_frequencies(cfg: LlamaConfig) -> Tensor:
    """Radians a position, for each rotary pair: [r] float32."""
    inv_freq = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
    scaling = cfg.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    # llama3: long waves are stretched, short ones kept, those between blended (Llama 3.1 model card).
    wavelength = 2 * math.pi / inv_freq
    num_rotations = scaling.original_max_position_embeddings / wavelength
    unscaled_share = (num_rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    unscaled_share = unscaled_share.clamp(0, 1)
    return (1 - unscaled_share) * inv_freq / scaling.factor + unscaled_share * inv_freq


def rotary_cos_sin(positions: Tensor, cfg: LlamaConfig) -> CosSin:
    """Cosine and sine of the rotary angles: positions [s] -> two [s, r] in float32."""
    theta = positions.float()[:, None] * inverse_frequencies(cfg).to(positions.device)
    return theta.cos(), theta.sin()


def embed(p: Llama, ids: Tensor) -> Tensor:
    """Token ids [s] -> [s, e]."""
    return p.embedding[ids]


def attention_heads_output(
    p: Layer, x: Tensor, rotary: CosSin, layer_idx: int, cfg: LlamaConfig, cache: AttentionBackend
) -> Tensor:
    """What the last linear of the attention is given: [s, e] -> [s, h·d]."""
    q, k, v = (rearrange(linear(w, x), "s (h d) -> s h d", d=cfg.head_dim) for w in (p.q, p.k, p.v))
    return rearrange(cache.attend(layer_idx, q, k, v, rotary, cfg.head_dim**-0.5), "s h d -> s (h d)")


def attention(p: Layer, x: Tensor, rotary: CosSin, layer_idx: int, cfg: LlamaConfig, cache: AttentionBackend) -> Tensor:
    return linear(p.o, attention_heads_output(p, x, rotary, layer_idx, cfg, cache))


def mlp_hidden(p: Layer, x: Tensor) -> Tensor:
    """What the last linear of the MLP is given: [s, e] -> [s, f]."""
    gate, up = p.gate, p.up
    if isinstance(gate.weight, Int4) and isinstance(up.weight, Int4) and gate.bias is None and up.bias is None:
        return int4_swiglu(x, gate.weight, up.weight)
    return swiglu(linear(gate, x), linear(up, x))


def mlp(p: Layer, x: Tensor) -> Tensor:
    return linear(p.down, mlp_hidden(p, x))


def forward(
    p: Llama,
    x: Tensor,
    positions: Tensor,
    cfg: LlamaConfig,
    cache: AttentionBackend,
    hidden_states: list[Tensor] | None = None,
) -> Tensor:
    """x [s, e] at positions [s] -> the final, normed hidden states [s, e]; `cache` is written in place.

    `states`, if given, receives the input of every layer and at the end the result, as Hugging Face's hidden_states.
    """
    record = hidden_states.append if hidden_states is not None else lambda _: None
    rotary = rotary_cos_sin(positions, cfg)
    for i, layer in enumerate(p.layers):
        record(x)
        x = x + attention(layer, rms_norm(x, layer.attention_norm, cfg.rms_norm_eps), rotary, i, cfg, cache)
        x = x + mlp(layer, rms_norm(x, layer.mlp_norm, cfg.rms_norm_eps))
    x = rms_norm(x, p.norm, cfg.rms_norm_eps)
    record(x)
    return x


def logits(p: Llama, x: Tensor) -> Tensor:
    """Hidden states [s, e] -> [s, v]."""
    return ops.linear(x, p.embedding if p.head is None else p.head)


def quantize_linears_rtn(p: Llama, group_size: int) -> Llama:
    """The same model with the linears of its layers rounded to int4; embedding, norms and head stay as they are."""

    def quantize_layer(layer: Layer) -> Layer:
        linears = {f.name: getattr(layer, f.name) for f in fields(layer) if isinstance(getattr(layer, f.name), Affine)}
        return replace(
            layer,
            **{
                name: Affine(ops.quantize_rtn(affine.weight, group_size), affine.bias)
                for name, affine in linears.items()
            },
        )

    return replace(p, layers=tuple(quantize_layer(layer) for layer in p.layers))
