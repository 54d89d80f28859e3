"""The VILA folder layout: config.json above llm/, vision_tower/ and mm_projector/, each with its own config.json and
safetensors, whole or in shards.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .models import vila
from .models.config import LlamaConfig, ProjectorConfig, VilaConfig, VisionConfig
from .models.params import LoadError, leaves, load, tree_map

PARTS = ("llm", "vision_tower", "mm_projector")

# What a checkpoint may hold beyond the model: tables that are computed, a tied head, SigLIP's unused pooling head.
IGNORED = {"llm": ("model.rotary_emb.",), "vision_tower": ("head.", "embeddings.position_ids"), "mm_projector": ()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: `LoadError` naming the file if it is missing or is not one."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise LoadError(f"{path} does not exist") from None
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise LoadError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def geometry(top: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> VilaConfig:
    """The model's geometry from the top config and those of its parts, all as dictionaries. Errors: `ConfigError`."""
    tower = VisionConfig.from_dict(parts["vision_tower"], top)
    llm = LlamaConfig.from_dict(parts["llm"])
    widths = {
        "mm_hidden_size": top.get("mm_hidden_size") or tower.width,
        "hidden_size": top.get("hidden_size") or llm.hidden_size,
    }
    return VilaConfig(llm, tower, ProjectorConfig.from_dict({**parts["mm_projector"], **widths}))


def read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The top config of a VILA folder and those of its parts. Errors: `LoadError`."""
    if not folder.is_dir():
        raise LoadError(f"{folder} is not a folder; a VILA folder holds config.json, {', '.join(PARTS)}")
    top = read_json(folder / "config.json")
    return top, {part: read_json(folder / part / "config.json") for part in PARTS}


def load_params(folder: Path, cfg: VilaConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> vila.Vila:
    """All parameters of a VILA folder. Errors: `LoadError`, for each part in one message."""
    specs = vila.declare(cfg, dtype)
    trees = []
    for part in PARTS:
        tensors = {key.removeprefix("vision_model."): x for key, x in read_tensors(folder / part, device)}
        ignored = IGNORED[part]
        if part == "llm":
            ignored += tuple(f"model.layers.{i}.self_attn.rotary_emb." for i in range(cfg.llm.num_hidden_layers))
            ignored += ("lm_head.",) if cfg.llm.tie_word_embeddings else ()
        trees.append(load(getattr(specs, part), tensors, str(folder / part), ignored))
    return vila.Vila(*trees)


def read_tensors(folder: Path, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, by name. Errors: `LoadError` for a missing or broken file."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise LoadError(f"{index} has no weight_map from tensors to files")
        names = set(weight_map.values())
    for name in sorted(names):
        path = folder / name
        if path.resolve().parent != folder.resolve():
            raise LoadError(f"{index} names {name!r}, which is not a file of its folder")
        if not path.exists():
            raise LoadError(f"{path} does not exist")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                yield from ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise LoadError(f"{path} is not a whole safetensors file: {error}") from None


def save(folder: Path, top: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], p: vila.Vila) -> None:
    """Write a VILA folder that `load_params` reads back to the same bits; the configs are written as they are given."""
    cfg = geometry(top, parts)
    for part in PARTS:
        tree = getattr(p, part)
        specs = getattr(vila.declare(cfg, (leaves(tree) or leaves(p.llm))[0].dtype), part)
        tensors: dict[str, Tensor] = {}
        tree_map(lambda spec, x, to=tensors: to.setdefault(spec.key, x.detach().contiguous().cpu()), specs, tree)
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / part / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / part / "config.json", parts[part])
    write_json(folder / "config.json", top)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what stands beside the weights and configs of a VILA folder: tokenizer and image processor files."""
    for part in PARTS:
        for file in sorted((source / part).glob("*")):
            written = file.name == "config.json" or file.name.endswith(".index.json")
            if file.suffix in (".json", ".txt", ".model", ".jinja") and not written:
                shutil.copy(file, target / part)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
