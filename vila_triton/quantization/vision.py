"""Quantize the vision tower and the projector to int4.

Each linear is quantized with GPTQ from the activations that reach it. There is no AWQ scale search here: a channel
scale can only be folded into a linear or a norm before it, and a GELU lies between fc1 and fc2 of these MLPs.
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
from vila_triton.ops import Int4

from .awq_gptq import WEIGHTS_PER_BLOCK, dequantize_blockwise, quantize_linear
from .config import QuantizationRun
from .hessian import HessianInfo, compute_hessian, error_correction_map
from .resumable import LayerwiseJob, State, StepResult, leaf_reader, part_dtype

MAX_POSITIONS = 1 << 14  # positions of the tower, and of the projector, that each is calibrated on at most
IMAGES_PER_BATCH = 16  # images that run through the tower together
LayerTree = TypeVar("LayerTree")


def pad_mlp_to_groups(source: CheckpointSource, cfg: VisionConfig, group_size: int) -> CheckpointSource:
    """Widen the MLPs of a vision tower to whole groups: SigLIP's are 4,304 wide, 16 times a prime.

    What is added is zero before the activation and after it, so the tower computes the same.
    """
    extra = -cfg.intermediate_size % group_size
    if not extra:
        return source
    tensors = source.tensors["vision_tower"]
    pads = {".mlp.fc1.weight": (0, 0, 0, extra), ".mlp.fc1.bias": (0, extra), ".mlp.fc2.weight": (0, extra)}

    def pad_tensor(name: str, x: Tensor) -> Tensor:
        return next((F.pad(x, pad) for end, pad in pads.items() if name.endswith(end)), x)

    meta = {name: pad_tensor(name, x) for name, x in tensors.meta.items()}
    padded = LazyTensors(meta, lambda name: pad_tensor(name, tensors[name]), tensors.release)
    config = source.part_configs["vision_tower"] | {"intermediate_size": cfg.intermediate_size + extra}
    return replace(
        source,
        part_configs=source.part_configs | {"vision_tower": config},
        tensors=source.tensors | {"vision_tower": padded},
    )


def positions_per_image(cfg: VisionConfig) -> int:
    """The number of positions that one image takes in the vision tower, all of its tiles together."""
    tiles = sum((side // cfg.tile_size) ** 2 for side in cfg.scales) or 1
    return tiles * (cfg.patches_per_side**2 + cfg.num_class_tokens)


def subsample_images(pixel_values: Tensor, num_positions: int) -> Tensor:
    """Take evenly spaced images of [n, c, H, W], of num_positions each, for at most MAX_POSITIONS together."""
    return pixel_values[:: -(-len(pixel_values) // max(1, MAX_POSITIONS // num_positions))]


class LazyLayers(Sequence[Any]):
    """The layers of a tower, each read from the checkpoint when it is accessed, and kept by nobody."""

    def __init__(self, specs: Sequence[Any], read: Callable[[ParameterSpec], Tensor]) -> None:
        self.specs, self.read = specs, read

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LazyLayers(self.specs[index], self.read)
        return tree_map(self.read, self.specs[index])


def open_streamed_tower(source: CheckpointSource, device: torch.device, dtype: torch.dtype) -> tuple[Any, VilaConfig]:
    """The vision tower with only one of its layers in memory at a time, and the geometry of its model."""
    cfg = build_vila_config(source.config, source.part_configs)
    read = leaf_reader(part_tensors(source, cfg, "vision_tower")[0], device)
    specs = vision.param_specs(cfg.vision_tower, dtype)
    tower = tree_map(read, replace(specs, layers=()))
    return replace(tower, layers=LazyLayers(specs.layers, read)), cfg


class LinearQuantizer:
    """Quantizes the linears of one layer from within its forward pass.

    The layer runs on the activations of the original model with `record` for its linears. With propagate_error it then
    runs on the activations behind the quantized layers with `quantize_and_apply`; without, `record` quantizes.

    names: the id of a linear's weight -> its name; int4: the same id -> the quantized weight.
    """

    def __init__(self, names: dict[int, str], group_size: int, propagate_error: bool) -> None:
        self.names, self.group_size, self.propagate_error = names, group_size, propagate_error
        self.original_inputs: dict[int, Tensor] = {}
        self.int4: dict[int, Int4] = {}
        self.report: dict[str, Any] = {"scales": {}, "linears": {}}
        self.input: Tensor | None = None  # of which the next two are; q, k and v share theirs
        self.hessian: HessianInfo | None = None
        self.correction: Tensor | None = None

    def record(self, p: Affine, x: Tensor) -> Tensor:
        """Apply a linear of the original model and keep its input."""
        self.original_inputs[id(p.weight)] = x
        if not self.propagate_error:
            self.quantize(p, x)
        return linear(p, x)

    def quantize_and_apply(self, p: Affine, x: Tensor) -> Tensor:
        """Quantize a linear from its input behind the quantized linears, and apply the result."""
        return linear(Affine(dequantize_blockwise(self.quantize(p, x), x.dtype, weights_per_block(p)), p.bias), x)

    def quantize(self, p: Affine, x: Tensor) -> Int4:
        """Quantize a linear whose input is x. Errors: ValueError naming the linear."""
        key = id(p.weight)
        if self.input is not x:
            inputs, originals = x.flatten(0, -2), self.original_inputs[key].flatten(0, -2)
            token_weights = torch.ones(len(inputs), device=x.device)
            self.input, self.hessian = x, compute_hessian(inputs, token_weights, self.group_size)
            if self.propagate_error:
                self.correction = error_correction_map(originals, inputs, token_weights, self.hessian)
        assert self.hessian is not None
        try:
            self.int4[key], self.report["linears"][self.names[key]] = quantize_linear(
                p.weight, self.correction, self.hessian, self.group_size, weights_per_block(p)
            )
        except ValueError as error:
            raise ValueError(f"{self.names[key]}: {error}") from None
        return self.int4[key]


def weights_per_block(p: Affine) -> int:
    """The number of weights of a linear that are quantized together."""
    return max(WEIGHTS_PER_BLOCK, p.weight.numel() // 8)


def quantize_linears(
    tree: LayerTree,
    specs: LayerTree,
    forward: Callable[[LayerTree, Tensor, LinearFn], Tensor],
    state: State,
    group_size: int,
    propagate_error: bool,
) -> StepResult:
    """Quantize the linears of one layer while the layer runs -> its quantized tree, a report, and its outputs.

    forward(tree, x, linear) must apply every linear through its argument `linear`. A first pass over the activations of
    the original model, state["reference"], records the inputs of each linear. With propagate_error a second pass over
    the activations behind the quantized layers, state["quantized"], quantizes each linear when it is reached: from its
    inputs in that pass, its weight corrected for the difference (`error_correction_map`). Without it they are quantized
    during the first pass. Everything is computed in the dtype of state["reference"], whatever that of the tree. Errors:
    ValueError naming the linear.
    """
    x = state["reference"]
    tree = tree_map(lambda leaf: leaf.to(x.dtype), tree)
    names = [".".join(spec.key.split(".")[-3:-1]) for spec in leaves(specs)]
    ids = map(id, leaves(tree))
    quantizer = LinearQuantizer(dict(zip(ids, names, strict=True)), group_size, propagate_error)
    with use_default_kernels(x.device, "prefill"):  # their attention holds no scores of all tiles at once
        out = {"reference": forward(tree, x, quantizer.record)}
        if propagate_error:
            out["quantized"] = forward(tree, state["quantized"], quantizer.quantize_and_apply)
    quantized = tree_map(lambda leaf: quantizer.int4.get(id(leaf), leaf), tree)
    return StepResult(quantized, quantizer.report, out, {})


def tower_steps(run: QuantizationRun, pixel_values: Tensor) -> LayerwiseJob:
    """Quantize the vision tower layer by layer, in float32, on some of the calibration images [n, c, H, W]."""
    cfg, group_size, propagate = run.cfg.vision_tower, run.config.group_size, run.config.propagate_error
    architecture, dtype = vision.TOWER_MODULES[cfg.model_type], part_dtype(run.source, "vision_tower")
    dense_specs = vision.param_specs(cfg, dtype).layers
    int4_specs = vision.param_specs(replace(cfg, group_size=group_size), dtype).layers

    def initial_state() -> State:
        tower, _ = open_streamed_tower(run.source, run.device, torch.float32)
        images = subsample_images(pixel_values, positions_per_image(cfg)).to(run.device, torch.float32)
        x = torch.cat([architecture.embed(tower, tiles, cfg) for tiles in vision.to_tiles(images, cfg)])
        return {"reference": x, "quantized": x.clone()} if propagate else {"reference": x}

    def quantize_one(i: int, layer: Any, state: State) -> StepResult:
        def forward(p: Any, x: Tensor, linear: LinearFn) -> Tensor:
            return architecture.block(p, x, cfg, linear)

        return quantize_linears(layer, dense_specs[i], forward, state, group_size, propagate)

    return LayerwiseJob("vision_tower", group_size, dense_specs, int4_specs, initial_state, quantize_one)


def projector_steps(run: QuantizationRun, quantized: CheckpointSource, pixel_values: Tensor) -> LayerwiseJob:
    """Quantize the projector in one step, in float32. quantized: the checkpoint with its tower quantized, if it is."""
    cfg, group_size, propagate = run.cfg.mm_projector, run.config.group_size, run.config.propagate_error
    dtype = part_dtype(run.source, "mm_projector")
    dense_specs = projector.param_specs(cfg, dtype)
    int4_specs = projector.param_specs(replace(cfg, group_size=group_size), dtype)

    def image_features(source: CheckpointSource) -> Tensor:
        tower, model_cfg = open_streamed_tower(source, run.device, torch.float32)
        images = subsample_images(pixel_values, run.cfg.tokens_per_image).to(run.device, torch.float32)
        with use_default_kernels(run.device, "prefill"):
            batches = images.split(IMAGES_PER_BATCH)
            return torch.cat([vision.forward(tower, batch, model_cfg.vision_tower) for batch in batches])

    def initial_state() -> State:
        x = image_features(run.source)
        return {"reference": x, "quantized": image_features(quantized)} if propagate else {"reference": x}

    def quantize_one(_: int, p: Any, state: State) -> StepResult:
        def forward(p: Any, x: Tensor, linear: LinearFn) -> Tensor:
            return projector.forward(p, x, cfg, linear)

        return quantize_linears(p, dense_specs, forward, state, group_size, propagate)

    return LayerwiseJob("mm_projector", group_size, (dense_specs,), (int4_specs,), initial_state, quantize_one)
