"""The picture tower and the projector in int4: every linear is rounded knowing its inputs, and nothing is made louder.

AWQ's scales have no place between the linears of an MLP here, which are a GELU apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.checkpoints.loading import build_vila_config, part_tensors
from vila_triton.checkpoints.sources import CheckpointSource
from vila_triton.engine.engine import use_default_kernels
from vila_triton.models import projector, vision
from vila_triton.models.config import VilaConfig, VisionConfig
from vila_triton.models.layers import Affine, LinearFn, linear
from vila_triton.models.params import LazyTensors, ParameterSpec, leaves, tree_map

from .awq_gptq import WEIGHTS_PER_BLOCK as WEIGHTS
from .awq_gptq import dequantize_blockwise, quantize_linear
from .hessian import compute_hessian, error_correction_map
from .resumable import LayerwiseJob, QuantizeConfig, State, StepResult, leaf_reader, part_dtype

MAX_POSITIONS = 1 << 14  # positions of the tower, and of the projector, that each is calibrated on at most
IMAGES_PER_BATCH = 16  # pictures that run through the tower together
LayerTree = TypeVar("LayerTree")


def pad_mlp_to_groups(source: CheckpointSource, cfg: VisionConfig, group_size: int) -> CheckpointSource:
    """The same tower, the MLPs of its layers widened to whole groups: SigLIP's are 4,304 wide, 16 times a prime.

    What is added is zero before the activation and after, so nothing that is computed changes.
    """
    extra = -cfg.intermediate_size % group_size
    if not extra:
        return source
    tensors = source.tensors["vision_tower"]
    pads = {".mlp.fc1.weight": (0, 0, 0, extra), ".mlp.fc1.bias": (0, extra), ".mlp.fc2.weight": (0, extra)}

    def pad_tensor(name: str, x: Tensor) -> Tensor:
        return next((F.pad(x, side) for end, side in pads.items() if name.endswith(end)), x)

    meta = {name: pad_tensor(name, x) for name, x in tensors.meta.items()}
    padded_tensors = LazyTensors(meta, lambda name: pad_tensor(name, tensors[name]), tensors.release)
    config = source.part_configs["vision_tower"] | {"intermediate_size": cfg.intermediate_size + extra}
    return replace(
        source,
        parts=source.part_configs | {"vision_tower": config},
        tensors=source.tensors | {"vision_tower": padded_tensors},
    )


def positions_per_image(cfg: VisionConfig) -> int:
    """Of the tower that a picture takes, in all of its tiles."""
    tiles = sum((side // cfg.tile_size) ** 2 for side in cfg.scales) or 1
    return tiles * (cfg.patches_per_side**2 + cfg.num_class_tokens)


def subsample_images(pixel_values: Tensor, num_positions: int) -> Tensor:
    """Of pictures [n, c, H, W] that take `each` positions every so manyth, so that they take no more than `ROOM`."""
    return pixel_values[:: -(-len(pixel_values) // max(1, MAX_POSITIONS // num_positions))]


class LazyLayers(Sequence[Any]):
    """The layers of a tower, each read when it comes up."""

    def __init__(self, specs: Sequence[Any], read: Callable[[ParameterSpec], Tensor]) -> None:
        self.specs, self.read = specs, read

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LazyLayers(self.specs[index], self.read)
        return tree_map(self.read, self.specs[index])


def open_streamed_tower(source: CheckpointSource, device: torch.device, dtype: torch.dtype) -> tuple[Any, VilaConfig]:
    """A tower that holds no more than one of its layers, and the geometry of its model."""
    cfg = build_vila_config(source.config, source.part_configs)
    read = leaf_reader(part_tensors(source, cfg, "vision_tower")[0], device)
    specs = vision.param_specs(cfg.vision_tower, dtype)
    tower = tree_map(read, replace(specs, layers=()))
    return replace(tower, layers=LazyLayers(specs.layers, read)), cfg


def quantize_linears(
    tree: LayerTree,
    specs: LayerTree,
    forward: Callable[[LayerTree, Tensor, LinearFn], Tensor],
    state: State,
    group_size: int,
    propagate_error: bool,
) -> StepResult:
    """The tree with every linear that f(tree, x, linear) applies in int4, each rounded when f comes to it.

    tree: in any dtype; the work is done in that of `x`.
    state: `x`, what f is given, and with `propagate` `seen`, what it is given where all before is rounded: a linear
    then learns from the inputs that the rounded ones before it give, and makes good what they spoilt.
    """
    tree = tree_map(lambda leaf: leaf.to(state["x"].dtype), tree)
    keys = [spec.key.split(".")[-3:-1] for spec in leaves(specs)]
    names = {id(leaf): ".".join(key) for leaf, key in zip(leaves(tree), keys, strict=True)}
    original_inputs: dict[int, Tensor] = {}
    quantized: dict[int, Any] = {}
    report: dict[str, Any] = {"scales": {}, "linears": {}}
    last: Any = (None, None, None)  # an input, its moments and what stands in for it: q, k and v share theirs

    def quantize(p: Affine, y: Tensor) -> Affine:
        nonlocal last
        key, weights_per_block = id(p.weight), max(WEIGHTS, p.weight.numel() // 8)
        if last[0] is not y:
            flat_inputs, flat_originals = y.flatten(0, -2), original_inputs[key].flatten(0, -2)
            token_weights = torch.ones(len(flat_inputs), device=y.device)
            hessian = compute_hessian(flat_inputs, token_weights, group_size)
            last = (
                y,
                hessian,
                error_correction_map(flat_originals, flat_inputs, token_weights, hessian) if propagate_error else None,
            )
        try:
            quantized[key], report["linears"][names[key]] = quantize_linear(
                p.weight, last[2], last[1], group_size, weights_per_block
            )
        except ValueError as error:
            raise ValueError(f"{names[key]}: {error}") from None
        return Affine(dequantize_blockwise(quantized[key], y.dtype, weights_per_block), p.bias)

    def record(p: Affine, y: Tensor) -> Tensor:
        original_inputs[id(p.weight)] = y
        if not propagate_error:
            quantize(p, y)
        return linear(p, y)

    with use_default_kernels(state["x"].device):  # attention that holds no scores of all tiles at once
        out = {"x": forward(tree, state["x"], record)}
        if propagate_error:
            out["seen"] = forward(tree, state["seen"], lambda p, y: linear(quantize(p, y), y))
    return StepResult(tree_map(lambda leaf: quantized.get(id(leaf), leaf), tree), report, out, {})


def tower_steps(
    source: CheckpointSource, cfg: VilaConfig, config: QuantizeConfig, pixel_values: Tensor, device: torch.device
) -> LayerwiseJob:
    """A step for each layer, in float32, on what the layers see of some of calibration's pictures [n, c, H, W]."""
    tower_cfg, architecture = cfg.vision_tower, vision.TOWER_MODULES[cfg.vision_tower.model_type]
    dtype = part_dtype(source, "vision_tower")
    dense_specs = vision.param_specs(tower_cfg, dtype).layers

    def initial_state() -> State:
        p, _ = open_streamed_tower(source, device, torch.float32)
        tile_batches = vision.to_tiles(
            subsample_images(pixel_values, positions_per_image(tower_cfg)).to(device, torch.float32), tower_cfg
        )
        x = torch.cat([architecture.embed(p, tiles, tower_cfg) for tiles in tile_batches])
        return {"x": x, "seen": x.clone()} if config.propagate_error else {"x": x}

    def quantize_one(i: int, layer: Any, state: State) -> StepResult:
        def forward(p: Any, x: Tensor, linear: LinearFn) -> Tensor:
            return architecture.block(p, x, tower_cfg, linear)

        return quantize_linears(layer, dense_specs[i], forward, state, config.group_size, config.propagate_error)

    int4_specs = vision.param_specs(replace(tower_cfg, group_size=config.group_size), dtype).layers
    return LayerwiseJob("vision_tower", config.group_size, dense_specs, int4_specs, initial_state, quantize_one)


def projector_steps(
    source: CheckpointSource,
    quantized: CheckpointSource,
    cfg: VilaConfig,
    config: QuantizeConfig,
    pixel_values: Tensor,
    device: torch.device,
) -> LayerwiseJob:
    """One step: the projector, in float32. made: the source, its tower rounded if it is to be."""
    projector_cfg, dtype = cfg.mm_projector, part_dtype(source, "mm_projector")

    def features(source: CheckpointSource) -> Tensor:
        p, model_cfg = open_streamed_tower(source, device, torch.float32)
        batches = subsample_images(pixel_values, cfg.tokens_per_image).to(device, torch.float32).split(IMAGES_PER_BATCH)
        with use_default_kernels(device):
            return torch.cat([vision.forward(p, x, model_cfg.vision_tower) for x in batches])

    def quantize_one(_: int, p: Any, state: State) -> StepResult:
        def forward(p: Any, x: Tensor, linear: LinearFn) -> Tensor:
            return projector.forward(p, x, projector_cfg, linear)

        return quantize_linears(p, dense_specs, forward, state, config.group_size, config.propagate_error)

    dense_specs = projector.param_specs(projector_cfg, dtype)
    int4_specs = projector.param_specs(replace(projector_cfg, group_size=config.group_size), dtype)
    return LayerwiseJob(
        "mm_projector",
        config.group_size,
        (dense_specs,),
        (int4_specs,),
        lambda: (
            {"x": features(source), "seen": features(quantized)} if config.propagate_error else {"x": features(source)}
        ),
        quantize_one,
    )
