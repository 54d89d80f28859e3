"""Load a checkpoint folder onto a device, one tensor at a time, and save a model as a VILA folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vila_triton.files.reading import read_json, require_contained
from vila_triton.models import llama, vila
from vila_triton.models.config import (
    LlamaConfig,
    ProjectorConfig,
    RunSettings,
    TokenSettings,
    VilaConfig,
    VisionConfig,
    read_dataclass,
    with_new_spellings,
)
from vila_triton.models.config_fields import name_folder_in_errors, nested_object
from vila_triton.models.layers import Affine
from vila_triton.models.params import LazyTensors, LoadError, check_state_dict, leaves, load_tree

from .generation_config import read_generation_config
from .int4_layouts import NATIVE
from .llava import is_llava, open_llava_folder
from .sources import PARTS, CheckpointSource, open_vila_folder
from .writing import write_checkpoint

# What a checkpoint may hold beyond the model: tables that are computed, a tied head, SigLIP's unused pooling head.
IGNORED_TENSORS = {
    "llm": ("model.rotary_emb.",),
    "vision_tower": ("head.", "embeddings.position_ids"),
    "mm_projector": (),
}
TOWER_PREFIX = "vision_model."  # of SigLIP's and CLIP's names as released; transformers 5 leaves it out


def open_checkpoint(folder: Path) -> CheckpointSource:
    """Open a VILA or a LLaVA-1.5 folder, in any of its layouts, without reading its weights. Errors: `LoadError`."""
    if not folder.is_dir():
        raise LoadError(f"{folder} is not a folder; a VILA folder holds config.json, {', '.join(PARTS)}")
    require_contained(folder, folder)
    config = with_new_spellings(read_json(folder / "config.json"))
    return open_llava_folder(folder, config) if is_llava(folder, config) else open_vila_folder(folder, config)


def build_vila_config(config: Mapping[str, Any], part_configs: Mapping[str, Mapping[str, Any]]) -> VilaConfig:
    """Build the geometry of a model from the top config and the configs of its parts.

    Errors: `ConfigError`, also for other fields of the configs that are read somewhere and do not hold what they must.
    """
    read_dataclass(RunSettings, config, "config")
    read_dataclass(TokenSettings, part_configs["llm"], "llm")
    nested_object(config, "quantization_config", "config")
    vision_cfg = VisionConfig.from_dict(part_configs["vision_tower"], config)
    llama_cfg = LlamaConfig.from_dict(part_configs["llm"])
    widths = {"mm_hidden_size": vision_cfg.feature_dim, "hidden_size": llama_cfg.hidden_size}
    widths |= {name: config[name] for name in widths if config.get(name) is not None}
    return VilaConfig(llama_cfg, vision_cfg, ProjectorConfig.from_dict({**part_configs["mm_projector"], **widths}))


def read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The top config and the configs of the parts, as a native VILA folder has them. Errors: `LoadError`."""
    source = open_checkpoint(folder)
    return source.config, source.part_configs


def load_generation_config(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Read generation_config.json from beside the model's config or the language model's. Errors: `LoadError`."""
    return read_generation_config([folder, open_checkpoint(folder).companion_dirs["llm"]], vocab_size)


def load_params(folder: Path, cfg: VilaConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> vila.Vila:
    """Load all parameters of a folder, one at a time, onto the device.

    On a CPU, those that have the dtype already stay on disk until they are touched, but for `llama.joined_leaves`.
    Errors: `LoadError`, with one message for each part.
    """
    source = open_checkpoint(folder)
    check_layer_counts(source, cfg)
    with name_folder_in_errors(folder):
        specs = vila.param_specs(cfg, dtype)
    joined = {"llm": llama.joined_leaves(specs.llm)}
    return vila.Vila(
        *(
            load_tree(getattr(specs, part), *part_tensors(source, cfg, part), device, joined.get(part, ()))
            for part in PARTS
        )
    )


def check_checkpoint(source: CheckpointSource) -> VilaConfig:
    """Check the tensors of a checkpoint against its configs; return its geometry. Errors: `LoadError`."""
    with name_folder_in_errors(source.folder):
        cfg = build_vila_config(source.config, source.part_configs)
        check_layer_counts(source, cfg)
        specs = vila.param_specs(cfg, torch.float16)
    for part in PARTS:
        tensors, where, ignored = part_tensors(source, cfg, part)
        check_state_dict(getattr(specs, part), tensors.meta, where, ignored)
    return cfg


def check_layer_counts(source: CheckpointSource, cfg: VilaConfig) -> None:
    """Check that no part claims more layers than it has tensors, before specs of that many layers are made.

    Errors: `LoadError`.
    """
    layer_counts = cfg.llm.num_hidden_layers, cfg.vision_tower.num_hidden_layers, cfg.mm_projector.num_linears
    for part, count in zip(PARTS, layer_counts):
        if count > (num_tensors := len(source.tensors[part])):
            where = source.companion_dirs[part]
            raise LoadError(f"{where}: the config says {count} layers, but there are {num_tensors} tensors")


def part_tensors(source: CheckpointSource, cfg: VilaConfig, part: str) -> tuple[LazyTensors, str, tuple[str, ...]]:
    """The tensors of a part under the names of its parameter specs, their folder, and prefixes to ignore."""
    tensors, ignored = source.tensors[part], IGNORED_TENSORS[part]
    if part == "vision_tower":
        tensors = tensors.rename({name.removeprefix(TOWER_PREFIX): name for name in tensors.meta})
    elif part == "llm":
        ignored += tuple(f"model.layers.{i}.self_attn.rotary_emb." for i in range(cfg.llm.num_hidden_layers))
        ignored += ("lm_head.",) if cfg.llm.tie_word_embeddings else ()
    return tensors, str(source.companion_dirs[part]), ignored


def save_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    part_configs: Mapping[str, Mapping[str, Any]],
    params: vila.Vila,
    source_folder: Path | None = None,
) -> None:
    """Write a VILA folder that `load_params` reads back to the same bits. The configs are written as they are given.

    source_folder: where the model came from; what lies beside its weights (tokenizer, image processor) is copied.
    Errors: ValueError for linear maps with low-rank terms, for which a checkpoint has no place.
    """
    if any(isinstance(p, Affine) and p.low_rank for p in leaves(params, Affine)):
        raise ValueError(
            "a checkpoint has no place for adapters: save them by peft's save_pretrained, and the model itself with "
            "adapters disabled, or merged and unloaded"
        )
    cfg = build_vila_config(config, part_configs)
    specs = vila.param_specs(cfg, leaves(params.llm)[0].dtype)
    prefix = "" if cfg.vision_tower.model_type.startswith("intern") else TOWER_PREFIX
    tensors = {}
    for part in PARTS:
        pairs = zip(leaves(getattr(specs, part)), leaves(getattr(params, part)), strict=True)
        key_prefix = prefix if part == "vision_tower" else ""
        tensors[part] = LazyTensors.from_tensors({key_prefix + spec.key: x for spec, x in pairs})
    configs = {part: dict(values) for part, values in part_configs.items()}
    layout = NATIVE if cfg.llm.group_size else None
    companion_dirs = open_checkpoint(source_folder).companion_dirs if source_folder is not None else {}
    source = CheckpointSource(source_folder or folder, "model", dict(config), configs, tensors, companion_dirs, layout)
    write_checkpoint(source, folder, overwrite=True)
