"""A checkpoint written as a VILA folder, its int4 linears in any layout, a tensor at a time."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.params import LazyTensors
from .generation_config import GENERATION_CONFIG_NAME
from .int4_layouts import AWQ_V2, LAYOUTS, NATIVE
from .int4_views import dequantize_linears, from_native_layout
from .shard_writer import MAX_SHARD_BYTES, ShardWriter, atomic_folder, partial_path, write_json
from .sources import PARTS, CheckpointSource, make_quantization_config
from .tensor_files import open_tensors

FORMATS = (*LAYOUTS, "dense")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".index.json")
COMPANION_PREFIXES = {
    "llm": ("tokenizer", "special_tokens", "added_tokens", "vocab.", "merges.", "generation_config", "chat_template"),
    "vision_tower": ("preprocessor_config", "processor_config"),
    "mm_projector": (),
}
ProgressCallback = Callable[[int, int], None]


def convert_layout(
    source: CheckpointSource, format_name: str
) -> tuple[dict[str, dict[str, Any]], dict[str, LazyTensors]]:
    """Configs and tensors by part, the llm's int4 linears in a layout, or "dense": every weight written out.

    Int4 linears of the other parts stay in our layout, which no other tool has a say in. Errors: ValueError for an
    unknown form, or a model that is not int4.
    """
    if format_name not in FORMATS:
        raise ValueError(f"no format {format_name!r}; there are: {', '.join(FORMATS)}")
    if format_name not in ("dense", NATIVE.name) and not source.group_size():
        raise ValueError(f"{source.folder} is not int4, so it cannot be written as {format_name}; quantize it first")
    configs, tensors = dict(source.part_configs), dict(source.tensors)
    for part in filter(source.group_size, PARTS):
        config = {key: value for key, value in configs[part].items() if key != "quantization_config"}
        group_size, rounding = source.group_size(part), source.rounding if part == "llm" else NATIVE.rounding
        if format_name == "dense":
            configs[part], tensors[part] = config, dequantize_linears(tensors[part], group_size, rounding)
        elif part == "llm":
            skipped = configs[part]["quantization_config"].get("modules_to_not_convert", ())
            configs[part] = config | make_quantization_config(LAYOUTS[format_name], group_size, rounding, skipped)
            tensors[part] = from_native_layout(tensors[part], LAYOUTS[format_name], group_size)
    return configs, tensors


def write_checkpoint(
    source: CheckpointSource,
    target: Path,
    format_name: str = "ours",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressCallback = lambda done, total: None,
    overwrite: bool = False,
    source_key: str | None = None,
    write_extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a checkpoint as a VILA folder; after a kill the same call goes on with the shard that was being written.

    `key`: what the source's bytes depend on, if it has no files.
    `beside`: writes what else the folder is to hold, last.
    `over`: into a folder that may be there, whose files of the same names are replaced at the end; begun afresh.
    Errors: ValueError, `LoadError`, before the target is there; OSError.
    """
    configs, tensors = convert_layout(source, format_name)
    total_bytes, bytes_before = sum(x.nbytes for lazy in tensors.values() for x in lazy.meta.values()), 0
    with atomic_folder(target, overwrite) as folder:
        for part in reversed(PARTS):  # the llm, the largest by far, last
            part_start = bytes_before
            writer = ShardWriter(
                folder / part / ("parts" if part == "llm" and format_name == AWQ_V2.name else ""),
                sort_by_layer(tensors[part]),
                f"{format_name} {source_key or source_fingerprint(source)}",
                max_shard_bytes,
                lambda done, _, start=part_start: progress(start + done, total_bytes),
            )
            bytes_before += writer.total_bytes
            for tensor in writer.meta:
                if tensor in writer.missing:
                    writer.write_tensor(tensor, tensors[part][tensor])
                    tensors[part].release(tensor)
            writer.close()
            write_json(folder / part / "config.json", configs[part])
        if format_name == AWQ_V2.name:
            merge_shards_to_pt(
                folder / "llm" / "parts", folder / "llm" / f"{target.name}-w4-g{source.group_size()}-awq-v2.pt"
            )
        for file, part in companion_files(source):
            shutil.copyfile(file, folder / part / file.name)
        nested = {f"{name}_cfg": configs[name] for name in PARTS if isinstance(source.config.get(f"{name}_cfg"), dict)}
        write_json(folder / "config.json", source.config | nested)
        write_extra(folder)


def sort_by_layer(tensors: LazyTensors) -> dict[str, Tensor]:
    """Names and shapes, layer 2 before layer 10: bytes that do not depend on the order in some other file."""

    def natural_key(name: str) -> list[tuple[bool, int, str]]:
        return [(not piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in name.split(".")]

    return {name: tensors.meta[name] for name in sorted(tensors.meta, key=natural_key)}


def merge_shards_to_pt(shard_folder: Path, file: Path) -> None:
    """One .pt of the tensors in a folder of shards, which go: torch.save reads them through their memory maps."""
    write_pt(file, dict(open_tensors(shard_folder)))
    shutil.rmtree(shard_folder)


def write_pt(file: Path, content: dict[str, Any]) -> None:
    """A file of torch.save that is there whole or not at all. Errors: OSError."""
    with partial_path(file).open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # what torch makes of it if only a part of a write was taken
            stream.flush()
            raise OSError(f"{file} cannot be written: {str(error).splitlines()[0]}") from None
        stream.flush()
        os.fsync(stream.fileno())
    partial_path(file).replace(file)


def source_fingerprint(source: CheckpointSource) -> str:
    """What tells whether a checkpoint is the one of before: its configs, its files, their sizes and times."""
    config_hash = hashlib.sha256(json.dumps([source.config, source.part_configs], sort_keys=True).encode()).hexdigest()
    files = sorted({file for folder in source.companion_dirs.values() for file in folder.glob("*") if file.is_file()})
    return config_hash + "".join(f" {file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def companion_files(source: CheckpointSource) -> Iterator[tuple[Path, str]]:
    """Files of the tokenizer, the image processor and generation, and the part of each, "." for none; no strays."""
    if (generation_config := source.folder / GENERATION_CONFIG_NAME).is_file() and source.companion_dirs[
        "llm"
    ] != source.folder:
        yield generation_config, "."
    for part, folder in source.companion_dirs.items():
        for file in sorted(folder.glob("*")):
            if (
                file.is_file()
                and file.name.startswith(COMPANION_PREFIXES[part])
                and not file.name.endswith(WEIGHT_SUFFIXES)
            ):
                yield file, part
