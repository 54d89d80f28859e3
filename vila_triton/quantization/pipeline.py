"""A checkpoint rounded to int4 layer by layer: one layer is held at a time, and what is finished outlives a kill."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.checkpoints.int4_views import quantize_linears_rtn
from vila_triton.checkpoints.loading import build_vila_config, check_checkpoint, part_tensors
from vila_triton.checkpoints.sources import PARTS, CheckpointSource
from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.checkpoints.writing import source_fingerprint
from vila_triton.engine import engine
from vila_triton.models import llama, projector, vila, vision
from vila_triton.models.config import VilaConfig
from vila_triton.models.params import leaves, load_tree

from . import awq_cache_file, awq_gptq, llm_awq
from . import vision as seeing
from .activations import CalibrationTokens
from .calibration_data import CalibrationSet, token_weights
from .llm_awq import AwqSearchResult
from .resumable import (
    CACHE_PREFIX,
    LayerwiseJob,
    QuantizeConfig,
    State,
    StepResult,
    part_dtype,
    part_prefix,
    replace_with_int4,
    resumable_work,
    run_steps,
)

PART_MODULES: dict[str, Any] = {"llm": llama, "vision_tower": vision, "mm_projector": projector}
ProgressCallback = Callable[[int, int], None]  # steps finished, steps


def prepare_source(source: CheckpointSource, config: QuantizeConfig) -> CheckpointSource:
    """The checkpoint as it is to be rounded, its tower widened if that is among it. Errors: ValueError if it cannot."""
    cfg, parts = check_checkpoint(source), ("llm", *config.extra_parts)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"no part {part!r}; there are: {', '.join(PARTS)}")
        if source.group_size(part):
            suffix = "" if part == "llm" else f": {part}"
            raise ValueError(f"{source.folder} is int4 already{suffix}; quantize the fp16 checkpoint that it came from")
    if config.mode not in ("ours", "upstream"):
        raise ValueError(f"no mode {config.mode!r}; there are: ours, upstream")
    if config.mode == "upstream" and not config.propagate_error:
        raise ValueError("upstream never carries errors on; leave propagate as it is")
    if config.mode == "upstream" and (config.image_weight != 1 or config.extra_parts):
        reason = (
            f"has no place for {', '.join(config.extra_parts)}" if config.extra_parts else "weighs all tokens alike"
        )
        raise ValueError(f"upstream's objective {reason}; that needs mode ours")
    if "vision_tower" in config.extra_parts:
        source = seeing.pad_mlp_to_groups(source, cfg.vision_tower, config.group_size)
    for part in parts:
        try:
            keys = [spec.key for spec in leaves(part_specs(source, part, config.group_size))]
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
        if not any(key.endswith(".qweight") for key in keys):
            raise ValueError(f"{part} has no linear that could be rounded")
    return source


def calibration_image_counts(cfg: VilaConfig, config: QuantizeConfig, pixel_values: Tensor) -> dict[str, int]:
    """By how many of calibration's pictures the parts that see are rounded."""
    positions = {"vision_tower": seeing.positions_per_image(cfg.vision_tower), "mm_projector": cfg.tokens_per_image}
    return {part: len(seeing.subsample_images(pixel_values, positions[part])) for part in config.extra_parts}


def part_specs(source: CheckpointSource, part: str, group_size: int | None = None) -> Any:
    """A part's tree, its linears in int4 if a group size is given."""
    cfg, module = getattr(build_vila_config(source.config, source.part_configs), part), PART_MODULES[part]
    return module.param_specs(replace(cfg, group_size=group_size), part_dtype(source, part))


def embed_calibration(
    source: CheckpointSource, calibration: CalibrationSet, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What the first layer is given for all rows of calibration: [s, e]."""
    cfg, features = build_vila_config(source.config, source.part_configs), None
    specs = vila.param_specs(cfg, dtype)
    if calibration.pixel_values is not None:
        tower, _ = seeing.open_streamed_tower(source, device, dtype)
        encoder = vila.Vila(
            None, tower, load_tree(specs.mm_projector, *part_tensors(source, cfg, "mm_projector"), device)
        )
        encoded = [
            engine.encode_images(encoder, x.to(device, dtype), cfg)
            for x in calibration.pixel_values.split(seeing.IMAGES_PER_BATCH)
        ]
        features = torch.cat(encoded).flatten(0, 1)
    embedding_table = part_tensors(source, cfg, "llm")[0][specs.llm.embedding.key]
    ids = torch.cat(calibration.sequences)
    token_embeddings = embedding_table[ids.clamp(min=0)].to(device, dtype)  # only these rows of the table are read
    if features is None:
        return token_embeddings
    ids = ids.to(device)
    return torch.where((ids < 0)[:, None], features[(-1 - ids).clamp(min=0)], token_embeddings)


@torch.no_grad()
def quantize_checkpoint(
    source: CheckpointSource,
    work: Path,
    config: QuantizeConfig,
    calibration: CalibrationSet,
    device: torch.device,
    on_progress: ProgressCallback = lambda done, total: None,
    awq_cache: list[AwqSearchResult] | None = None,
) -> CheckpointSource:
    """The rounded checkpoint, its layers in the folder `work`; called again after a kill, it goes on from there.

    cache: what llm-awq found, instead of a search (mode upstream). Errors: ValueError, naming the layer.
    """
    source = quantized = prepare_source(source, config)
    cfg, pixel_values = build_vila_config(source.config, source.part_configs), calibration.pixel_values
    if config.extra_parts and pixel_values is None:
        raise ValueError(f"{', '.join(config.extra_parts)}: rounded by what it sees, but calibration has no pictures")
    tokens = CalibrationTokens(
        tuple(map(len, calibration.sequences)), token_weights(calibration.sequences, config.image_weight).to(device)
    )
    if config.mode == "upstream" and awq_cache is None and sum(tokens.lengths) < llm_awq.CLIP_TOKENS:
        raise ValueError(
            f"upstream's clipping needs {llm_awq.CLIP_TOKENS} tokens of calibration, there are {sum(tokens.lengths)}"
        )
    cache_items = [x for result in awq_cache or () for pair in (result.scales | result.clips).items() for x in pair]
    with resumable_work(
        work,
        config,
        source_fingerprint(source),
        *calibration.sequences,
        *(() if pixel_values is None else (pixel_values,)),
        *cache_items,
    ):
        layer_counts = {"vision_tower": cfg.vision_tower.num_hidden_layers, "mm_projector": 1}
        steps_before, total = 0, cfg.llm.num_hidden_layers + sum(layer_counts[part] for part in config.extra_parts)
        for part in (*sorted(config.extra_parts, reverse=True), "llm"):
            if part == "llm" or pixel_values is None:
                steps = language_steps(source, quantized, cfg, config, calibration, tokens, device, awq_cache)
            elif part == "vision_tower":
                steps = seeing.tower_steps(source, cfg, config, pixel_values, device)
            else:
                steps = seeing.projector_steps(source, quantized, cfg, config, pixel_values, device)
            quantized = run_steps(
                steps, quantized, work, device, lambda done, before=steps_before: on_progress(before + done, total)
            )
            steps_before += len(steps.dense_specs)
        on_progress(total, total)
    return quantized


def language_steps(
    source: CheckpointSource,
    quantized: CheckpointSource,
    cfg: VilaConfig,
    config: QuantizeConfig,
    calibration: CalibrationSet,
    tokens: CalibrationTokens,
    device: torch.device,
    awq_cache: list[AwqSearchResult] | None,
) -> LayerwiseJob:
    """A step for each layer of the language model. made: the source, rounded already what sees."""
    checkpoint_dtype = part_dtype(source, "llm")
    dtype = torch.float32 if config.mode == "ours" else checkpoint_dtype

    def initial_state() -> State:
        x = embed_calibration(source, calibration, dtype, device)
        if config.mode != "ours" or not config.propagate_error:
            return {"x": x}
        return {
            "x": x,
            "seen": embed_calibration(quantized, calibration, dtype, device) if config.extra_parts else x.clone(),
        }

    def quantize_one(i: int, layer: llama.Layer, state: State) -> StepResult:
        x = state["x"]
        if config.mode == "ours":
            r = awq_gptq.quantize_layer(
                layer, x, state.get("seen", x), tokens, cfg.llm, config.group_size, config.propagate_error
            )
            return StepResult(
                r.layer,
                r.report,
                {"x": r.reference_out, "seen": r.quantized_out} if config.propagate_error else {"x": r.reference_out},
                {},
            )
        cached = awq_cache[i].to(device) if awq_cache else None
        int4_layer, out, result = llm_awq.quantize_layer(layer, x, tokens, cfg.llm, config.group_size, cached)
        cache_tensors = {f"scale.{scale_group}": s for scale_group, s in result.scales.items()}
        cache_tensors |= {f"clip.{name}": bound for name, bound in result.clips.items()}
        report = {"scales": {place: {"ratio": r} for place, r in result.ratios.items()}, "linears": {}}
        return StepResult(int4_layer, report, {"x": out}, cache_tensors)

    dense_specs, int4_specs = (part_specs(source, "llm", group_size).layers for group_size in (None, config.group_size))
    return LayerwiseJob("llm", config.group_size, dense_specs, int4_specs, initial_state, quantize_one)


def save_cache(work: Path, file: Path) -> None:
    """What mode upstream found, as llm-awq's cache."""
    layers = []
    for path in sorted(work.glob("llm-*.safetensors")):
        cached = {n.removeprefix(CACHE_PREFIX): x for n, x in open_tensors(path).items() if n.startswith(CACHE_PREFIX)}
        scales, clips = (
            {n.partition(".")[2]: x for n, x in cached.items() if n.startswith(prefix)} for prefix in ("scale", "clip")
        )
        layers.append(AwqSearchResult(scales, clips, {}))
    awq_cache_file.save_awq_cache(file, layers)


def round_to_nearest(source: CheckpointSource, config: QuantizeConfig) -> CheckpointSource:
    """The checkpoint with every linear rounded to the nearest level; nothing is computed yet."""
    quantized = source = prepare_source(source, config)
    for part in ("llm", *config.extra_parts):
        keys = [spec.key for spec in leaves(part_specs(source, part, config.group_size))]
        prefix = part_prefix(source, part)
        stems = [prefix + key.removesuffix(".qweight") for key in keys if key.endswith(".qweight")]
        quantized = replace_with_int4(
            quantized, part, quantize_linears_rtn(source.tensors[part], stems, config.group_size), config.group_size
        )
    return quantized
