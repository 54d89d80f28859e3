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
from .layers import Affine, Leaf, declare_linear, linear
from .params import Spec

Rotary = tuple[Tensor, Tensor]  # cosine and sine of the rotary angles of the new tokens, [s, r] float32 each


class Cache(Protocol):
    """What attention needs of the past: it keeps the new keys and values and answers the new queries."""

    @property
    def policy(self) -> str:
        """ "fast" or "invariant", see `ops.attention`."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, scale: float) -> Tensor:
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


def declare(cfg: LlamaConfig, dtype: torch.dtype) -> Llama:
    """The tree of a model, its leaves named as in Hugging Face's `LlamaForCausalLM`."""
    e, f, d = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    h, g = cfg.num_attention_heads, cfg.num_key_value_heads

    def dense(n: int, k: int, key: str, bias: bool) -> Affine:
        return declare_linear(n, k, key, dtype, bias, None if key in cfg.dense else cfg.group_size, cfg.order)

    def norm(key: str) -> Spec:
        return Spec((e,), f"{key}.weight", dtype, "ones")

    def layer(i: int) -> Layer:
        at = f"model.layers.{i}"
        return Layer(
            norm(f"{at}.input_layernorm"),
            dense(h * d, e, f"{at}.self_attn.q_proj", cfg.attention_bias),
            dense(g * d, e, f"{at}.self_attn.k_proj", cfg.attention_bias),
            dense(g * d, e, f"{at}.self_attn.v_proj", cfg.attention_bias),
            dense(e, h * d, f"{at}.self_attn.o_proj", cfg.attention_bias),
            norm(f"{at}.post_attention_layernorm"),
            dense(f, e, f"{at}.mlp.gate_proj", cfg.mlp_bias),
            dense(f, e, f"{at}.mlp.up_proj", cfg.mlp_bias),
            dense(e, f, f"{at}.mlp.down_proj", cfg.mlp_bias),
        )

    return Llama(
        Spec((cfg.vocab_size, e), "model.embed_tokens.weight", dtype),
        tuple(layer(i) for i in range(cfg.num_hidden_layers)),
        norm("model.norm"),
        None if cfg.tie_word_embeddings else Spec((cfg.vocab_size, e), "lm_head.weight", dtype),
    )


def frequencies(cfg: LlamaConfig) -> Tensor:
    """Radians a position, for each rotary pair: [r] float32."""
    inverse = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
    scaling = cfg.rope_scaling
    if scaling is None:
        return inverse
    if scaling.rope_type == "linear":
        return inverse / scaling.factor
    # llama3: long waves are stretched, short ones kept, those between blended (Llama 3.1 model card).
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_position_embeddings / wavelength
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * inverse / scaling.factor + kept * inverse


def angles(positions: Tensor, cfg: LlamaConfig) -> Rotary:
    """Cosine and sine of the rotary angles: positions [s] -> two [s, r] in float32."""
    theta = positions.float()[:, None] * frequencies(cfg).to(positions.device)
    return theta.cos(), theta.sin()


def embed(p: Llama, ids: Tensor) -> Tensor:
    """Token ids [s] -> [s, e]."""
    return p.embedding[ids]


def attended(p: Layer, x: Tensor, rotary: Rotary, i: int, cfg: LlamaConfig, cache: Cache) -> Tensor:
    """What the last linear of the attention is given: [s, e] -> [s, h·d]."""
    q, k, v = (rearrange(linear(w, x), "s (h d) -> s h d", d=cfg.head_dim) for w in (p.q, p.k, p.v))
    return rearrange(cache.attend(i, q, k, v, rotary, cfg.head_dim**-0.5), "s h d -> s (h d)")


def attention(p: Layer, x: Tensor, rotary: Rotary, i: int, cfg: LlamaConfig, cache: Cache) -> Tensor:
    return linear(p.o, attended(p, x, rotary, i, cfg, cache))


def gated(p: Layer, x: Tensor) -> Tensor:
    """What the last linear of the MLP is given: [s, e] -> [s, f]."""
    gate, up = p.gate, p.up
    if isinstance(gate.weight, Int4) and isinstance(up.weight, Int4) and gate.bias is None and up.bias is None:
        return int4_swiglu(x, gate.weight, up.weight)
    return swiglu(linear(gate, x), linear(up, x))


def mlp(p: Layer, x: Tensor) -> Tensor:
    return linear(p.down, gated(p, x))


def llama(
    p: Llama, x: Tensor, positions: Tensor, cfg: LlamaConfig, cache: Cache, states: list[Tensor] | None = None
) -> Tensor:
    """x [s, e] at positions [s] -> the final, normed hidden states [s, e]; `cache` is written in place.

    `states`, if given, receives the input of every layer and at the end the result, as Hugging Face's hidden_states.
    """
    keep = states.append if states is not None else lambda _: None
    rotary = angles(positions, cfg)
    for i, layer in enumerate(p.layers):
        keep(x)
        x = x + attention(layer, rms_norm(x, layer.attention_norm, cfg.rms_norm_eps), rotary, i, cfg, cache)
        x = x + mlp(layer, rms_norm(x, layer.mlp_norm, cfg.rms_norm_eps))
    x = rms_norm(x, p.norm, cfg.rms_norm_eps)
    keep(x)
    return x


def logits(p: Llama, x: Tensor) -> Tensor:
    """Hidden states [s, e] -> [s, v]."""
    return ops.linear(x, p.embedding if p.head is None else p.head)


def quantized(p: Llama, group: int) -> Llama:
    """The same model with the linears of its layers rounded to int4; embedding, norms and head stay as they are."""

    def rounded(layer: Layer) -> Layer:
        linears = {f.name: getattr(layer, f.name) for f in fields(layer) if isinstance(getattr(layer, f.name), Affine)}
        return replace(
            layer, **{name: Affine(ops.quantize(old.weight, group), old.bias) for name, old in linears.items()}
        )

    return replace(p, layers=tuple(rounded(layer) for layer in p.layers))
