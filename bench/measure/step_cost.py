"""What a step of a model must do at least: bytes read and written, and multiplications, counted from its declaration.

A step reads every weight it uses and the keys and values of the past once, writes those of the new tokens, and does the
multiplications of its linears and attentions. Left out, so that the counts stay lower bounds: activations (they may
stay on the chip), vectors (norms, biases), embedding rows, and every op that is neither a linear nor an attention. Not
allowed for: weights that stay in a cache from step to step, at most a few percent of a released model.

int4 is what the language model's layers hold, in groups (codes, float16 scales and zeros); all else is float16, or the
dtype that `language` is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vila_triton.models import llama, params, projector, vision
from vila_triton.models.config import LlamaConfig, ProjectorConfig, VisionConfig
from vila_triton.ops import encoder_attention, prefill_attention

from .model_configs import Geometry

HALF = torch.float16


@dataclass(frozen=True)
class Work:
    """What a step must do at least."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, bandwidth: float, flops: float) -> float:
        """The least it takes where so many bytes and flops are done in a second."""
        return max(self.bytes / bandwidth, self.flops / flops)


def matrices(tree: Any) -> list[params.Spec]:
    return [spec for spec in params.leaves(tree) if len(spec.shape) > 1]


def numbers(tree: Any) -> int:
    """Numbers in the matrices of a declared tree: each is one multiplication and one addition a token."""
    return sum(math.prod(spec.shape) for spec in matrices(tree))


def size(tree: Any) -> int:
    """Bytes of the matrices of a declared tree."""
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in matrices(tree))


def cache_bytes(cfg: LlamaConfig, dtype: torch.dtype = HALF) -> int:
    """Bytes of the keys and values of one token, all layers."""
    return 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * dtype.itemsize


def language(cfg: LlamaConfig, batch: int, new: int, history: int, dtype: torch.dtype = HALF) -> Work:
    """`new` tokens for each of `batch` sequences with `history` cached ones; logits of the last token of each."""
    dense = llama.declare(replace(cfg, group_size=None), dtype)
    head = dense.embedding if dense.head is None else dense.head
    g, d = cfg.num_key_value_heads, cfg.head_dim
    ratio = cfg.num_attention_heads // g
    attention, _ = prefill_attention.cost(b=batch, s=new, t=history, g=g, ratio=ratio, d=d, l=16, dtype="float16")
    flops = 2 * batch * (new * numbers(dense.layers) + numbers(head)) + cfg.num_hidden_layers * attention
    past_and_new = batch * (history + new) * cache_bytes(cfg, dtype)
    return Work(flops, size(llama.declare(cfg, dtype).layers) + size(head) + past_and_new)


def seeing(model: Geometry) -> tuple[VisionConfig, vision.Tower, projector.Projector, Sequence[int]]:
    """The tower, its declared tree and that of the projector, and the pixels of a side at each scale it looks at."""
    if not model.vision_tower:
        raise ValueError(f"{model.name} is a language model alone; it takes no pictures")
    values = model.vision_tower
    top = {"mm_vision_select_layer": values["select_layer"], "s2": "s2_scales" in values}
    top |= {"s2_scales": values.get("s2_scales"), "s2_max_split_size": values["image_size"]}
    tower = VisionConfig.from_dict(values, top)
    widths = ProjectorConfig(model.mm_projector["mm_projector_type"], tower.width, model.llm.hidden_size)
    return tower, vision.declare(tower, HALF), projector.declare(widths, HALF), tower.scales or [tower.tile]


def pictures(model: Geometry, count: int) -> Work:
    """Tower and projector for `count` pictures together; S2 looks at each in tiles of the tower's size."""
    tower, seen, projected, scales = seeing(model)
    used = seen.layers[: tower.num_hidden_layers + 1 + tower.select_layer]
    tiles = count * sum((side // tower.tile) ** 2 for side in scales)
    positions = tower.grid**2 + tower.class_tokens
    d = tower.hidden_size // tower.num_attention_heads
    attention, _ = encoder_attention.cost(b=tiles, s=positions, h=tower.num_attention_heads, d=d, dtype="float16")
    linears = tiles * (positions * numbers(used) + tower.grid**2 * numbers(seen.patch))
    linears += count * model.image_tokens * numbers(projected)
    return Work(2 * linears + len(used) * attention, sum(map(size, (used, seen.patch, projected))))


def prefill(model: Geometry, words: int, count: int = 0) -> Work:
    """From pixels and tokens to the first logits: `count` pictures and so many tokens beside them."""
    spoken = language(model.llm, 1, words + count * model.image_tokens, 0)
    return pictures(model, count) + spoken if count else spoken


def decode(model: Geometry, batch: int, context: int) -> Work:
    """One more token for each of `batch` sequences, which then attends to `context` tokens, itself included."""
    return language(model.llm, batch, 1, context - 1)


def needs(model: Geometry, tokens: int) -> int:
    """Bytes of all parameters and a cache of so many tokens."""
    parts = [llama.declare(model.llm, HALF), *(seeing(model)[1:3] if model.vision_tower else ())]
    return sum(map(size, parts)) + tokens * cache_bytes(model.llm)
