"""Write a checkpoint as a VILA folder, its int4 linears in any layout, one tensor at a time."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.files.atomic import atomic_file, write_json
from vila_triton.models.params import LazyTensors

from .atomic_folder import atomic_folder
from .generation_config import GENERATION_CONFIG_NAME
from .int4_layouts import AWQ_V2, LAYOUTS, NATIVE
from .int4_views import dequantize_linears, from_native_layout
from .quantization_config import make_quantization_config
from .shard_writer import MAX_SHARD_BYTES, ShardWriter
from .sources import PARTS, CheckpointSource
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
    """Configs and tensors by part, with the language model's int4 linears in another layout, or every weight "dense".

    Int4 linears of the other parts stay in the native layout, since no other tool reads them.
    Errors: ValueError for an unknown format, or a layout of int4 for a model that is not int4.
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
    format_name: str = NATIVE.name,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressCallback = lambda done, total: None,
    overwrite: bool = False,
    source_key: str | None = None,
    write_extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a checkpoint as a VILA folder. After a kill, the same call goes on with the shard that was being written.

    source_key: what the bytes of the source depend on, if it has no files. write_extra: called last, with the folder,
    to write more files into it. overwrite: write into a folder that may be there, and replace its files of the same
    names at the end; it always begins afresh. progress: called with bytes done and in all. Errors: ValueError or
    `LoadError` before the target is there; OSError.
    """
    configs, tensors = convert_layout(source, format_name)
    total_bytes, bytes_before = sum(x.nbytes for lazy in tensors.values() for x in lazy.meta.values()), 0
    with atomic_folder(target, overwrite) as folder:
        for part in reversed(PARTS):  # the llm, the largest by far, last
            writer = ShardWriter(
                folder / part / ("parts" if part == "llm" and format_name == AWQ_V2.name else ""),
                sort_by_layer(tensors[part]),
                f"{format_name} {source_key or source_fingerprint(source)}",
                max_shard_bytes,
                lambda done, _, start=bytes_before: progress(start + done, total_bytes),
            )
            bytes_before += writer.total_bytes
            for tensor in writer.meta:
                if tensor in writer.missing:
                    writer.write_tensor(tensor, tensors[part][tensor])
                    tensors[part].release(tensor)
            writer.close()
            write_json(folder / part / "config.json", configs[part])
        if format_name == AWQ_V2.name:
            file = folder / "llm" / f"{target.name}-w4-g{source.group_size()}-awq-v2.pt"
            merge_shards_to_pt(folder / "llm" / "parts", file)
        for file, part in companion_files(source):
            shutil.copyfile(file, folder / part / file.name)
        nested = {f"{name}_cfg": configs[name] for name in PARTS if isinstance(source.config.get(f"{name}_cfg"), dict)}
        write_json(folder / "config.json", source.config | nested)
        write_extra(folder)


def sort_by_layer(tensors: LazyTensors) -> dict[str, Tensor]:
    """Names and meta tensors, layer 2 before layer 10: bytes do not depend on the order in some other file."""

    def natural_key(name: str) -> list[tuple[bool, int, str]]:
        return [(not piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in name.split(".")]

    return {name: tensors.meta[name] for name in sorted(tensors.meta, key=natural_key)}


def merge_shards_to_pt(shard_folder: Path, file: Path) -> None:
    """Write the tensors of a folder of shards as one .pt and remove the folder. torch.save reads them through memory
    maps.
    """
    write_pt(file, dict(open_tensors(shard_folder)))
    shutil.rmtree(shard_folder)


def write_pt(file: Path, content: dict[str, Any]) -> None:
    """Write a file of torch.save atomically. Errors: OSError."""
    with atomic_file(file) as partial, partial.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # torch's message when only a part of a write was taken
            stream.flush()
            raise OSError(f"{file} cannot be written: {str(error).splitlines()[0]}") from None
        stream.flush()
        os.fsync(stream.fileno())


def source_fingerprint(source: CheckpointSource) -> str:
    """Identify the state of a checkpoint by its configs and by the names, sizes and times of its files."""
    config_hash = hashlib.sha256(json.dumps([source.config, source.part_configs], sort_keys=True).encode()).hexdigest()
    files = sorted({file for folder in source.companion_dirs.values() for file in folder.glob("*") if file.is_file()})
    return config_hash + "".join(f" {file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def companion_files(source: CheckpointSource) -> Iterator[tuple[Path, str]]:
    """The files of the tokenizer, the image processor and generation, each with its part, "." for none. Others are left
    out.
    """
    generation_config = source.folder / GENERATION_CONFIG_NAME
    if generation_config.is_file() and source.companion_dirs["llm"] != source.folder:
        yield generation_config, "."
    for part, folder in source.companion_dirs.items():
        for file in sorted(folder.glob("*")):
            is_companion = file.name.startswith(COMPANION_PREFIXES[part]) and not file.name.endswith(WEIGHT_SUFFIXES)
            if file.is_file() and is_companion:
                yield file, part
