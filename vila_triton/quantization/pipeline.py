"""Quantize a whole checkpoint to int4, layer by layer: one layer is in memory at a time, and a killed run can go on."""

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
from .activations import CalibrationTokens
from .calibration_data import CalibrationSet, token_weights
from .config import METHODS, QuantizationRun, QuantizeConfig
from .llm_awq import AwqSearchResult
from .resumable import (
    CACHE_PREFIX,
    LayerwiseJob,
    State,
    StepResult,
    part_dtype,
    part_prefix,
    replace_with_int4,
    resumable_work,
    run_steps,
)
from .vision import (
    IMAGES_PER_BATCH,
    open_streamed_tower,
    pad_mlp_to_groups,
    positions_per_image,
    projector_steps,
    subsample_images,
    tower_steps,
)

PART_MODULES: dict[str, Any] = {"llm": llama, "vision_tower": vision, "mm_projector": projector}
ProgressCallback = Callable[[int, int], None]  # steps finished, all steps


def prepare_source(source: CheckpointSource, config: QuantizeConfig) -> CheckpointSource:
    """The checkpoint as it is to be quantized: a vision tower that is among the parts has its MLPs padded to groups.

    Errors: ValueError for a checkpoint that is int4 already, a part without a linear of this group size, and settings
    that do not go together.
    """
    cfg, parts = check_checkpoint(source), ("llm", *config.extra_parts)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"no part {part!r}; there are: {', '.join(PARTS)}")
        if source.group_size(part):
            suffix = "" if part == "llm" else f": {part}"
            raise ValueError(f"{source.folder} is int4 already{suffix}; quantize the fp16 checkpoint that it came from")
    if config.method not in METHODS:
        raise ValueError(f"no method {config.method!r}; there are: {', '.join(METHODS)}")
    if config.method == "llm-awq" and not config.propagate_error:
        raise ValueError("llm-awq never propagates errors; leave propagate_error as it is")
    if config.method == "llm-awq" and (config.image_weight != 1 or config.extra_parts):
        extra = ", ".join(config.extra_parts)
        reason = f"has no place for {extra}" if extra else "weighs all tokens alike"
        raise ValueError(f"llm-awq's objective {reason}; that needs method awq-gptq")
    if "vision_tower" in config.extra_parts:
        source = pad_mlp_to_groups(source, cfg.vision_tower, config.group_size)
    for part in parts:
        try:
            keys = [spec.key for spec in leaves(part_specs(source, part, config.group_size))]
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
        if not any(key.endswith(".qweight") for key in keys):
            raise ValueError(f"{part} has no linear that could be quantized")
    return source


def calibration_image_counts(cfg: VilaConfig, config: QuantizeConfig, pixel_values: Tensor) -> dict[str, int]:
    """The number of calibration images that the vision tower and the projector are quantized on, by part."""
    positions = {"vision_tower": positions_per_image(cfg.vision_tower), "mm_projector": cfg.tokens_per_image}
    return {part: len(subsample_images(pixel_values, positions[part])) for part in config.extra_parts}


def part_specs(source: CheckpointSource, part: str, group_size: int | None = None) -> Any:
    """The parameter specs of a part, its linears in int4 if a group size is given."""
    cfg = getattr(build_vila_config(source.config, source.part_configs), part)
    return PART_MODULES[part].param_specs(replace(cfg, group_size=group_size), part_dtype(source, part))


def embed_calibration(run: QuantizationRun, source: CheckpointSource, dtype: torch.dtype) -> Tensor:
    """Embed all calibration sequences as the first layer of the language model gets them: [s, e].

    source: the checkpoint whose vision tower and projector encode the images.
    """
    cfg, device = build_vila_config(source.config, source.part_configs), run.device
    specs, image_features = vila.param_specs(cfg, dtype), None
    if run.calibration.pixel_values is not None:
        tower, _ = open_streamed_tower(source, device, dtype)
        projector = load_tree(specs.mm_projector, *part_tensors(source, cfg, "mm_projector"), device)
        encoder = vila.Vila(None, tower, projector)
        batches = run.calibration.pixel_values.split(IMAGES_PER_BATCH)
        encoded = [engine.encode_images(encoder, batch.to(device, dtype), cfg) for batch in batches]
        image_features = torch.cat(encoded).flatten(0, 1)
    embedding_table = part_tensors(source, cfg, "llm")[0][specs.llm.embedding.key]
    ids = torch.cat(run.calibration.sequences)
    token_embeddings = embedding_table[ids.clamp(min=0)].to(device, dtype)  # reads only these rows from the file
    if image_features is None:
        return token_embeddings
    ids = ids.to(device)
    return torch.where((ids < 0)[:, None], image_features[(-1 - ids).clamp(min=0)], token_embeddings)


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
    """Quantize a checkpoint, layer by layer; called again after a kill, it goes on behind the last finished layer.

    work: the folder for finished layers, in which the tensors of the result lie. awq_cache: scales and clips by layer,
    which are applied instead of a search (method "llm-awq").
    Errors: ValueError, naming the layer if it is one's.
    """
    source = quantized = prepare_source(source, config)
    cfg, pixel_values = build_vila_config(source.config, source.part_configs), calibration.pixel_values
    run = QuantizationRun(source, cfg, config, calibration, device)
    if config.extra_parts and pixel_values is None:
        raise ValueError(f"{', '.join(config.extra_parts)}: quantized by its inputs, but calibration has no images")
    weights = token_weights(calibration.sequences, config.image_weight).to(device)
    tokens = CalibrationTokens(tuple(map(len, calibration.sequences)), weights)
    if config.method == "llm-awq" and awq_cache is None:
        llm_awq.require_clip_tokens(sum(tokens.lengths))
    cache_items = [x for result in awq_cache or () for pair in (result.scales | result.clips).items() for x in pair]
    images = () if pixel_values is None else (pixel_values,)
    with resumable_work(work, config, source_fingerprint(source), *calibration.sequences, *images, *cache_items):
        layer_counts = {"vision_tower": cfg.vision_tower.num_hidden_layers, "mm_projector": 1}
        total = cfg.llm.num_hidden_layers + sum(layer_counts[part] for part in config.extra_parts)
        steps_before = 0

        def progress_from(first_step: int) -> Callable[[int], None]:
            return lambda done: on_progress(first_step + done, total)

        for part in (*sorted(config.extra_parts, reverse=True), "llm"):
            if part == "llm" or pixel_values is None:
                job = language_steps(run, quantized, tokens, awq_cache)
            elif part == "vision_tower":
                job = tower_steps(run, pixel_values)
            else:
                job = projector_steps(run, quantized, pixel_values)
            quantized = run_steps(job, quantized, work, device, progress_from(steps_before))
            steps_before += len(job.dense_specs)
        on_progress(total, total)
    return quantized


def language_steps(
    run: QuantizationRun,
    quantized: CheckpointSource,
    tokens: CalibrationTokens,
    awq_cache: list[AwqSearchResult] | None,
) -> LayerwiseJob:
    """Quantize the language model layer by layer. quantized: the checkpoint with the parts before it quantized."""
    config, llm, dtype = run.config, run.cfg.llm, part_dtype(run.source, "llm")
    group_size, propagate = config.group_size, config.method == "awq-gptq" and config.propagate_error

    def initial_state() -> State:
        x = embed_calibration(run, run.source, torch.float32 if config.method == "awq-gptq" else dtype)
        if not propagate:
            return {"reference": x}
        quantized_x = embed_calibration(run, quantized, x.dtype) if config.extra_parts else x.clone()
        return {"reference": x, "quantized": quantized_x}

    def quantize_one(i: int, layer: llama.Layer, state: State) -> StepResult:
        x = state["reference"]
        if config.method == "awq-gptq":
            r = awq_gptq.quantize_layer(layer, x, state.get("quantized", x), tokens, llm, group_size, propagate)
            state = {"reference": r.reference_out} | ({"quantized": r.quantized_out} if propagate else {})
            return StepResult(r.layer, r.report, state, {})
        cached = awq_cache[i].to(run.device) if awq_cache else None
        int4_layer, out, result = llm_awq.quantize_layer(layer, x, tokens, llm, group_size, cached)
        cache_tensors = {f"scale.{scale_group}": s for scale_group, s in result.scales.items()}
        cache_tensors |= {f"clip.{name}": bound for name, bound in result.clips.items()}
        scales = {scale_group: {"ratio": ratio} for scale_group, ratio in result.ratios.items()}
        return StepResult(int4_layer, {"scales": scales, "linears": {}}, {"reference": out}, cache_tensors)

    dense_specs, int4_specs = (part_specs(run.source, "llm", size).layers for size in (None, group_size))
    return LayerwiseJob("llm", group_size, dense_specs, int4_specs, initial_state, quantize_one)


def save_cache(work: Path, file: Path) -> None:
    """Write the scales and clips that method "llm-awq" has searched, as an llm-awq cache."""
    layers = []
    for path in sorted(work.glob("llm-*.safetensors")):
        tensors: dict[str, dict[str, Tensor]] = {"scale": {}, "clip": {}}
        for name, x in open_tensors(path).items():
            if name.startswith(CACHE_PREFIX):
                kind, _, key = name.removeprefix(CACHE_PREFIX).partition(".")
                tensors[kind][key] = x
        layers.append(AwqSearchResult(tensors["scale"], tensors["clip"], {}))
    awq_cache_file.save_awq_cache(file, layers)


def round_to_nearest(source: CheckpointSource, config: QuantizeConfig) -> CheckpointSource:
    """The checkpoint with every linear rounded to nearest when it is read."""
    quantized = source = prepare_source(source, config)
    for part in ("llm", *config.extra_parts):
        keys = [spec.key for spec in leaves(part_specs(source, part, config.group_size))]
        prefix = part_prefix(source, part)
        stems = [prefix + key.removesuffix(".qweight") for key in keys if key.endswith(".qweight")]
        tensors = quantize_linears_rtn(source.tensors[part], stems, config.group_size)
        quantized = replace_with_int4(quantized, part, tensors, config.group_size)
    return quantized
