"""The bytes and FLOPs that a step of a model takes at least, counted from its declaration.

A step reads each weight it uses and the cached keys and values once, writes those of the new tokens, and does the
multiplications of its linears and attentions. Left out, so that the counts are lower bounds: activations (they may stay
on the chip), vectors (norms, biases), rows of the embedding, and ops that are neither linear nor attention. Weights
that stay in a cache from step to step are not allowed for, at most a few percent of a released model.

The linears of the language model's layers may be int4, in groups (codes, float16 scales and zero points); everything
else is float16, or the dtype given to `language_cost`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vila_triton.models import llama, params, projector, vision
from vila_triton.models.config import LlamaConfig, ProjectorConfig, VisionConfig
from vila_triton.ops import encoder_attention, prefill_attention

from .model_configs import ReleasedModel

HALF = torch.float16


@dataclass(frozen=True)
class StepCost:
    """The FLOPs and bytes of a step, at least."""

    flops: int
    bytes: int

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, bandwidth: float, flops: float) -> float:
        """Returns the least time at a bandwidth in bytes and a rate in FLOPs per second."""
        return max(self.bytes / bandwidth, self.flops / flops)


def matrices(tree: Any) -> list[params.ParameterSpec]:
    """Returns the specs of a tree that have two axes or more."""
    return [spec for spec in params.leaves(tree) if len(spec.shape) > 1]


def num_matrix_elements(tree: Any) -> int:
    """Returns the elements of the matrices of a declared tree: each is one multiplication and one
    addition per token.
    """
    return sum(math.prod(spec.shape) for spec in matrices(tree))


def matrix_bytes(tree: Any) -> int:
    """Returns the bytes of the matrices of a declared tree."""
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in matrices(tree))


def kv_bytes_per_token(cfg: LlamaConfig, dtype: torch.dtype = HALF) -> int:
    """Returns the bytes of the keys and values of one token, all layers."""
    return 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * dtype.itemsize


def language_cost(
    cfg: LlamaConfig, batch: int, new_tokens: int, cached_tokens: int, dtype: torch.dtype = HALF
) -> StepCost:
    """Returns the cost of `new_tokens` for each of `batch` sequences with `cached_tokens`, with the logits of the last
    token of each.
    """
    dense = llama.param_specs(replace(cfg, group_size=None), dtype)
    head = dense.embedding if dense.head is None else dense.head
    g, d = cfg.num_key_value_heads, cfg.head_dim
    ratio = cfg.num_attention_heads // g
    attention, _ = prefill_attention.cost(
        b=batch, s=new_tokens, t=cached_tokens, g=g, ratio=ratio, d=d, l=16, dtype="float16"
    )
    flops = (
        2 * batch * (new_tokens * num_matrix_elements(dense.layers) + num_matrix_elements(head))
        + cfg.num_hidden_layers * attention
    )
    past_and_new = batch * (cached_tokens + new_tokens) * kv_bytes_per_token(cfg, dtype)
    return StepCost(flops, matrix_bytes(llama.param_specs(cfg, dtype).layers) + matrix_bytes(head) + past_and_new)


def vision_specs(model: ReleasedModel) -> tuple[VisionConfig, vision.Tower, projector.Projector, Sequence[int]]:
    """Returns the tower's config, the declared trees of tower and projector, and the pixels of a side
    at each S2 scale.
    """
    if not model.vision_tower:
        raise ValueError(f"{model.name} is a language model alone; it takes no images")
    values = model.vision_tower
    vila_fields = {"mm_vision_select_layer": values["select_layer"], "s2": "s2_scales" in values}
    vila_fields |= {"s2_scales": values.get("s2_scales"), "s2_max_split_size": values["image_size"]}
    tower = VisionConfig.from_dict(values, vila_fields)
    projector_config = ProjectorConfig(
        model.mm_projector["mm_projector_type"], tower.feature_dim, model.llm.hidden_size
    )
    return (
        tower,
        vision.param_specs(tower, HALF),
        projector.param_specs(projector_config, HALF),
        tower.scales or [tower.tile_size],
    )


def vision_cost(model: ReleasedModel, num_images: int) -> StepCost:
    """Returns the cost of tower and projector for some images together. S2 runs the tower on each in
    tiles of its size.
    """
    tower, tower_specs, projector_specs, scales = vision_specs(model)
    used_layers = tower_specs.layers[: tower.num_hidden_layers + 1 + tower.select_layer]
    tiles = num_images * sum((side // tower.tile_size) ** 2 for side in scales)
    positions = tower.patches_per_side**2 + tower.num_class_tokens
    d = tower.hidden_size // tower.num_attention_heads
    attention, _ = encoder_attention.cost(b=tiles, s=positions, h=tower.num_attention_heads, d=d, dtype="float16")
    linears = tiles * (
        positions * num_matrix_elements(used_layers)
        + tower.patches_per_side**2 * num_matrix_elements(tower_specs.patch)
    )
    linears += num_images * model.image_tokens * num_matrix_elements(projector_specs)
    return StepCost(
        2 * linears + len(used_layers) * attention,
        sum(map(matrix_bytes, (used_layers, tower_specs.patch, projector_specs))),
    )


def prefill_cost(model: ReleasedModel, text_tokens: int, num_images: int = 0) -> StepCost:
    """Returns the cost from pixels and tokens to the first logits, for so many images and text tokens."""
    text_cost = language_cost(model.llm, 1, text_tokens + num_images * model.image_tokens, 0)
    return vision_cost(model, num_images) + text_cost if num_images else text_cost


def decode_cost(model: ReleasedModel, batch: int, context: int) -> StepCost:
    """Returns the cost of one more token for each of `batch` sequences, which attends to `context` tokens, itself
    included.
    """
    return language_cost(model.llm, batch, 1, context - 1)


def memory_bytes(model: ReleasedModel, tokens: int) -> int:
    """Returns the bytes of all parameters and of a cache of so many tokens."""
    parts = [llama.param_specs(model.llm, HALF), *(vision_specs(model)[1:3] if model.vision_tower else ())]
    return sum(map(matrix_bytes, parts)) + tokens * kv_bytes_per_token(model.llm)
