"""Checkpoint folders: what is in one, loaded onto a device a tensor at a time, and written as a VILA folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine.generation_config import read_generation
from ..files.reading import read_json, require_own
from ..models import vila
from ..models.config import LlamaConfig, ProjectorConfig, Settings, VilaConfig, VisionConfig, Words, read
from ..models.config_fields import object_in, of_folder
from ..models.params import Lazy, LoadError, leaves, load, require_fit
from .int4_layouts import OURS
from .llava import is_llava, llava_source
from .shard_writer import write_json
from .sources import PARTS, Source, vila_source
from .writing import write

__all__ = [
    "PARTS",
    "generation",
    "geometry",
    "load_params",
    "open_source",
    "read_configs",
    "read_json",
    "require_fits",
    "save",
    "write_json",
]

# What a checkpoint may hold beyond the model: tables that are computed, a tied head, SigLIP's unused pooling head.
IGNORED = {"llm": ("model.rotary_emb.",), "vision_tower": ("head.", "embeddings.position_ids"), "mm_projector": ()}
TOWER_PREFIX = "vision_model."  # of SigLIP's and CLIP's names as released; transformers 5 leaves it out


def open_source(folder: Path) -> Source:
    """What a folder is: a VILA or a LLaVA-1.5 in any of their layouts. Nothing but configs and directories is read.

    Errors: `LoadError`.
    """
    if not folder.is_dir():
        raise LoadError(f"{folder} is not a folder; a VILA folder holds config.json, {', '.join(PARTS)}")
    require_own(folder, folder)
    top = read_json(folder / "config.json")
    return llava_source(folder, top) if is_llava(folder, top) else vila_source(folder, top)


def geometry(top: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> VilaConfig:
    """The model's geometry from the top config and those of its parts, all as dictionaries.

    Errors: `ConfigError`, for what else the configs say too.
    """
    read(Settings, top, "config")
    read(Words, parts["llm"], "llm")
    object_in(top, "quantization_config", "config")
    tower = VisionConfig.from_dict(parts["vision_tower"], top)
    llm = LlamaConfig.from_dict(parts["llm"])
    widths = {"mm_hidden_size": tower.width, "hidden_size": llm.hidden_size}
    widths |= {name: top[name] for name in widths if top.get(name) is not None}
    return VilaConfig(llm, tower, ProjectorConfig.from_dict({**parts["mm_projector"], **widths}))


def read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The top config of a folder and those of its parts, as a VILA folder of ours has them. Errors: `LoadError`."""
    source = open_source(folder)
    return source.top, source.parts


def generation(folder: Path, vocab_size: int) -> dict[str, Any]:
    """What generation_config.json says, beside the model's config or the language model's. Errors: `LoadError`."""
    return read_generation([folder, open_source(folder).beside["llm"]], vocab_size)


def load_params(folder: Path, cfg: VilaConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> vila.Vila:
    """All parameters of a folder, one at a time onto the device; on a CPU those that have the dtype already stay on
    disk until they are touched. Errors: `LoadError`, for each part in one message.
    """
    source = open_source(folder)
    require_layers(source, cfg)
    with of_folder(folder):
        specs = vila.declare(cfg, dtype)
    return vila.Vila(*(load(getattr(specs, part), *fitting(source, cfg, part), device) for part in PARTS))


def require_fits(source: Source) -> VilaConfig:
    """The geometry of a checkpoint. Errors: `ConfigError`, `LoadError` if it or the tensors are of no model of ours."""
    with of_folder(source.folder):
        cfg = geometry(source.top, source.parts)
        require_layers(source, cfg)
        specs = vila.declare(cfg, torch.float16)
    for part in PARTS:
        tensors, where, ignored = fitting(source, cfg, part)
        require_fit(getattr(specs, part), tensors.meta, where, ignored)
    return cfg


def require_layers(source: Source, cfg: VilaConfig) -> None:
    """`LoadError` if a part has more layers than tensors: what it would be is not even declared."""
    layers = cfg.llm.num_hidden_layers, cfg.vision_tower.num_hidden_layers, cfg.mm_projector.depth
    for part, count in zip(PARTS, layers):
        if count > (there := len(source.tensors[part])):
            raise LoadError(f"{source.beside[part]}: the config says {count} layers, but there are {there} tensors")


def fitting(source: Source, cfg: VilaConfig, part: str) -> tuple[Lazy, str, tuple[str, ...]]:
    """A part's tensors under the names that the model declares, where they are, and what to ignore among them."""
    tensors, ignored = source.tensors[part], IGNORED[part]
    if part == "vision_tower":
        tensors = tensors.named({name.removeprefix(TOWER_PREFIX): name for name in tensors.meta})
    elif part == "llm":
        ignored += tuple(f"model.layers.{i}.self_attn.rotary_emb." for i in range(cfg.llm.num_hidden_layers))
        ignored += ("lm_head.",) if cfg.llm.tie_word_embeddings else ()
    return tensors, str(source.beside[part]), ignored


def save(
    folder: Path,
    top: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]],
    p: vila.Vila,
    came_from: Path | None = None,
) -> None:
    """Write a VILA folder that `load_params` reads back to the same bits; the configs are written as they are given.

    What stood beside the weights of the folder that it came from is copied.
    """
    cfg = geometry(top, parts)
    specs = vila.declare(cfg, leaves(p.llm)[0].dtype)
    prefix = "" if cfg.vision_tower.model_type.startswith("intern") else TOWER_PREFIX
    tensors = {}
    for part in PARTS:
        trees = leaves(getattr(specs, part)), leaves(getattr(p, part))
        before = prefix if part == "vision_tower" else ""
        tensors[part] = Lazy.of({before + spec.key: x for spec, x in zip(*trees, strict=True)})
    configs = {part: dict(values) for part, values in parts.items()}
    layout = OURS if cfg.llm.group_size else None
    beside = open_source(came_from).beside if came_from is not None else {}
    source = Source(came_from or folder, "model", dict(top), configs, tensors, beside, layout)
    write(source, folder, "ours", over=True)
