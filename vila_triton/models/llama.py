"""The LLaMA decoder (Touvron et al. 2023) as pure functions over a tree of parameters.

The new tokens of all sequences lie end to end in one ragged batch: x [s, e]. The tokens before them are behind an
`AttentionBackend`, which is called once per layer.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vila_triton import ops
from vila_triton.ops import Int4, int4_swiglu, rms_norm, swiglu

from .checkpointing import layer_runner
from .config import LlamaConfig
from .joined import Group, joined, leaf_groups, with_gradients
from .layers import Affine, Leaf, add_low_rank, linear, linear_specs
from .params import ParameterSpec, tree_map
from .side_by_side import lay_side_by_side

CosSin = tuple[Tensor, Tensor]  # cosine and sine of the rotary angles of the new tokens, [s, d / 2] float32 each


class AttentionBackend(Protocol):
    """Attention with a KV cache: keeps the new keys and values and returns the attention output of the new queries."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        """Attend in one layer: q [s, h, d], k and v [s, g, d] of the new tokens, before rotation -> [s, h, d]."""
        ...


@dataclass(frozen=True)
class Layer:
    """The parameters of one decoder layer.

    qkv: q, k and v as one linear, if they lie side by side in memory. It is no field, since it follows from these.
    """

    qkv: ClassVar[Affine | None] = None  # of a class of layers; each has its own

    attention_norm: Leaf  # [e]
    q: Affine  # [h·d, e]
    k: Affine  # [g·d, e]
    v: Affine  # [g·d, e]
    o: Affine  # [e, h·d]
    mlp_norm: Leaf  # [e]
    gate: Affine  # [f, e]
    up: Affine  # [f, e]
    down: Affine  # [e, f]

    def __post_init__(self) -> None:
        object.__setattr__(self, "qkv", joined(self.q, self.k, self.v))

    def __reduce__(self) -> Any:
        return Layer, tuple(getattr(self, f.name) for f in fields(self))  # a copy works `qkv` out of its own leaves


@dataclass(frozen=True)
class Llama:
    """The parameters of the language model."""

    embedding: Leaf  # [v, e]
    layers: tuple[Layer, ...]
    norm: Leaf  # [e]
    head: Affine | None  # [v, e], no bias; None: the embedding serves as head too


def param_specs(cfg: LlamaConfig, dtype: torch.dtype) -> Llama:
    """Specs of a model, named as in Hugging Face's `LlamaForCausalLM`."""
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
        None if cfg.tie_word_embeddings else linear_specs(cfg.vocab_size, e, "lm_head", dtype, bias=False),
    )


def joined_leaves(p: Llama) -> list[Group]:
    """The leaves of a model, or their specs, that shall lie side by side in one storage: q, k and v of each layer."""
    return [group for layer in p.layers for group in leaf_groups(layer.q, layer.k, layer.v)]


def join_leaves(p: Llama) -> Llama:
    """The same model with `joined_leaves` side by side, copied if they are not."""
    moved = {
        id(leaf): view
        for parts, axis in joined_leaves(p)
        for leaf, view in zip(parts, lay_side_by_side(parts, axis), strict=True)
    }
    return tree_map(lambda leaf: moved.get(id(leaf), leaf), p)


def inverse_frequencies(cfg: LlamaConfig) -> Tensor:
    """Rotary frequencies in radians per position, [d / 2] float32, stretched as `rope_scaling` says."""
    inv_freq = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
    scaling = cfg.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    # llama3: long waves are stretched, short ones kept, those between blended (Llama 3.1 model card).
    wavelength = 2 * math.pi / inv_freq
    num_rotations = scaling.original_max_position_embeddings / wavelength
    blend = (num_rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq


@lru_cache(maxsize=64)
def frequencies_on_device(cfg: LlamaConfig, device: torch.device) -> Tensor:
    """`inverse_frequencies` on a device, [d / 2] float32, computed on the CPU and copied once: a copy at every step
    would wait for the device.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        return inverse_frequencies(cfg).to(device)


def rotary_cos_sin(positions: Tensor, cfg: LlamaConfig) -> CosSin:
    """Cosine and sine of the rotary angles at positions [s] -> two tensors [s, d / 2] float32."""
    theta = positions.float()[:, None] * frequencies_on_device(cfg, positions.device)
    return theta.cos(), theta.sin()


def embed(p: Llama, ids: Tensor) -> Tensor:
    """Embed token ids [s] -> [s, e]."""
    return F.embedding(ids, p.embedding)


def qkv_projections(p: Layer, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of normed hidden states: x [s, e] -> [s, h·d], [s, g·d] and [s, g·d], by one product if
    their weights lie side by side.
    """
    parts = p.q, p.k, p.v
    if p.qkv is None:
        return tuple(linear(part, x) for part in parts)
    outs = linear(with_gradients(p.qkv, *parts), x).split([part.weight.shape[0] for part in parts], -1)
    return tuple(add_low_rank(part.low_rank, x, out) for part, out in zip(parts, outs))


def attention_heads_output(
    p: Layer, x: Tensor, rotary: CosSin, layer_idx: int, cfg: LlamaConfig, backend: AttentionBackend
) -> Tensor:
    """Causal self-attention before the output projection: normed hidden states [s, e] -> heads end to end [s, h·d]."""
    q, k, v = (y.unflatten(-1, (-1, cfg.head_dim)) for y in qkv_projections(p, x))  # [s, h, d]
    return rearrange(backend.attend(layer_idx, q, k, v, rotary, cfg.head_dim**-0.5), "s h d -> s (h d)")


def attention(
    p: Layer,
    x: Tensor,
    rotary: CosSin,
    layer_idx: int,
    cfg: LlamaConfig,
    backend: AttentionBackend,
    residual: Tensor | None = None,
) -> Tensor:
    """Causal self-attention, plus a residual [s, e]: normed hidden states [s, e] -> [s, e]."""
    return linear(p.o, attention_heads_output(p, x, rotary, layer_idx, cfg, backend), residual)


def mlp_hidden(p: Layer, x: Tensor) -> Tensor:
    """Hidden activations of the SwiGLU MLP, silu(x gateᵀ) * (x upᵀ): [s, e] -> [s, f].

    One fused op if gate and up are int4 without biases and low-rank terms, and no gradient is asked for: its backward
    pass would compute both products again.
    """
    gate, up = p.gate, p.up
    has_gradient = torch.is_grad_enabled() and x.requires_grad
    if not has_gradient and all(isinstance(w.weight, Int4) and w.bias is None and not w.low_rank for w in (gate, up)):
        return int4_swiglu(x, gate.weight, up.weight)
    return swiglu(linear(gate, x), linear(up, x))


def mlp(p: Layer, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The SwiGLU MLP (Shazeer 2020), plus a residual [s, e]: normed hidden states [s, e] -> [s, e]."""
    return linear(p.down, mlp_hidden(p, x), residual)


def block(p: Layer, x: Tensor, rotary: CosSin, layer_idx: int, cfg: LlamaConfig, backend: AttentionBackend) -> Tensor:
    """Run one layer: hidden states x [s, e] -> [s, e]."""
    x = attention(p, rms_norm(x, p.attention_norm, cfg.rms_norm_eps), rotary, layer_idx, cfg, backend, x)
    return mlp(p, rms_norm(x, p.mlp_norm, cfg.rms_norm_eps), x)


def forward(
    p: Llama,
    x: Tensor,
    positions: Tensor,
    cfg: LlamaConfig,
    backend: AttentionBackend,
    hidden_states: list[Tensor] | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """Run all layers: embeddings x [s, e] at positions [s] -> hidden states after the final norm [s, e].

    `backend` stores keys and values in place. `hidden_states`, if given, is extended by the input of every layer and
    the result, as `output_hidden_states` of Hugging Face has them. With `checkpointing` a backward pass runs every
    layer anew, so `backend` must not store anything then.
    """
    record = hidden_states.append if hidden_states is not None else lambda _: None
    rotary, run_layer = rotary_cos_sin(positions, cfg), layer_runner(block, checkpointing)
    for i, layer in enumerate(p.layers):
        record(x)
        x = run_layer(layer, x, rotary, i, cfg, backend)
    x = rms_norm(x, p.norm, cfg.rms_norm_eps)
    record(x)
    return x


def head(p: Llama) -> Affine:
    """The language-model head [v, e]."""
    return Affine(p.embedding, None) if p.head is None else p.head


def logits(p: Llama, x: Tensor) -> Tensor:
    """Apply the language-model head: hidden states [s, e] -> logits [s, v]."""
    return linear(head(p), x)


def quantize_linears_rtn(p: Llama, group_size: int) -> Llama:
    """Quantize the linears of all layers to int4 by rounding to nearest; embedding, norms and head stay as they are."""

    def quantize_layer(layer: Layer) -> Layer:
        linears = {f.name: p for f in fields(layer) if isinstance(p := getattr(layer, f.name), Affine)}
        return replace(
            layer,
            **{name: replace(p, weight=ops.Int4.pack(p.weight, group_size)) for name, p in linears.items()},
        )

    return replace(p, layers=tuple(quantize_layer(layer) for layer in p.layers))
