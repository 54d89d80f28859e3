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

from ..engine.generation_config import FILE
from ..models.params import Lazy
from .int4_layouts import LAYOUTS, OURS, V2
from .int4_views import dense, encoded
from .shard_writer import SHARD_BYTES, Shards, building, part, write_json
from .sources import PARTS, Source, quantization
from .tensor_files import open_tensors

FORMS = (*LAYOUTS, "dense")
WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")
COMPANIONS = {
    "llm": ("tokenizer", "special_tokens", "added_tokens", "vocab.", "merges.", "generation_config", "chat_template"),
    "vision_tower": ("preprocessor_config", "processor_config"),
    "mm_projector": (),
}
Progress = Callable[[int, int], None]


def in_form(source: Source, form: str) -> tuple[dict[str, dict[str, Any]], dict[str, Lazy]]:
    """Configs and tensors by part, the llm's int4 linears in a layout, or "dense": every weight written out.

    Int4 linears of the other parts stay in our layout, which no other tool has a say in. Errors: ValueError for an
    unknown form, or a model that is not int4.
    """
    if form not in FORMS:
        raise ValueError(f"no format {form!r}; there are: {', '.join(FORMS)}")
    if form not in ("dense", OURS.name) and not source.group():
        raise ValueError(f"{source.folder} is not int4, so it cannot be written as {form}; quantize it first")
    configs, held = dict(source.parts), dict(source.tensors)
    for name in filter(source.group, PARTS):
        plain = {key: value for key, value in configs[name].items() if key != "quantization_config"}
        group, order = source.group(name), source.order if name == "llm" else OURS.order
        if form == "dense":
            configs[name], held[name] = plain, dense(held[name], group, order)
        elif name == "llm":
            left = configs[name]["quantization_config"].get("modules_to_not_convert", ())
            configs[name] = plain | quantization(LAYOUTS[form], group, order, left)
            held[name] = encoded(held[name], LAYOUTS[form], group)
    return configs, held


def write(
    source: Source,
    target: Path,
    form: str = "ours",
    *,
    limit: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
    over: bool = False,
    key: str | None = None,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a checkpoint as a VILA folder; after a kill the same call goes on with the shard that was being written.

    `key`: what the source's bytes depend on, if it has no files.
    `beside`: writes what else the folder is to hold, last.
    `over`: into a folder that may be there, whose files of the same names are replaced at the end; begun afresh.
    Errors: ValueError, `LoadError`, before the target is there; OSError.
    """
    configs, held = in_form(source, form)
    total, before = sum(x.nbytes for lazy in held.values() for x in lazy.meta.values()), 0
    with building(target, over) as folder:
        for name in reversed(PARTS):  # the llm, the largest by far, last
            start = before
            shards = Shards(
                folder / name / ("parts" if name == "llm" and form == V2.name else ""),
                in_order(held[name]),
                f"{form} {key or identity(source)}",
                limit,
                lambda done, _, start=start: progress(start + done, total),
            )
            before += shards.total
            for tensor in shards.meta:
                if tensor in shards.missing:
                    shards.put(tensor, held[name][tensor])
                    held[name].forget(tensor)
            shards.close()
            write_json(folder / name / "config.json", configs[name])
        if form == V2.name:
            save_pt(folder / "llm" / "parts", folder / "llm" / f"{target.name}-w4-g{source.group()}-awq-v2.pt")
        for file, name in companions(source):
            shutil.copyfile(file, folder / name / file.name)
        nested = {f"{name}_cfg": configs[name] for name in PARTS if isinstance(source.top.get(f"{name}_cfg"), dict)}
        write_json(folder / "config.json", source.top | nested)
        beside(folder)


def in_order(tensors: Lazy) -> dict[str, Tensor]:
    """Names and shapes, layer 2 before layer 10: bytes that do not depend on the order in some other file."""

    def key(name: str) -> list[tuple[bool, int, str]]:
        return [(not step.isdigit(), int(step) if step.isdigit() else 0, step) for step in name.split(".")]

    return {name: tensors.meta[name] for name in sorted(tensors.meta, key=key)}


def save_pt(parts: Path, file: Path) -> None:
    """One .pt of the tensors in a folder of shards, which go: torch.save reads them through their memory maps."""
    write_pt(file, dict(open_tensors(parts)))
    shutil.rmtree(parts)


def write_pt(file: Path, held: dict[str, Any]) -> None:
    """A file of torch.save that is there whole or not at all. Errors: OSError."""
    with part(file).open("wb") as opened:
        try:
            torch.save(held, opened)
        except RuntimeError as error:  # what torch makes of it if only a part of a write was taken
            opened.flush()
            raise OSError(f"{file} cannot be written: {str(error).splitlines()[0]}") from None
        opened.flush()
        os.fsync(opened.fileno())
    part(file).replace(file)


def identity(source: Source) -> str:
    """What tells whether a checkpoint is the one of before: its configs, its files, their sizes and times."""
    said = hashlib.sha256(json.dumps([source.top, source.parts], sort_keys=True).encode()).hexdigest()
    files = sorted({file for place in source.beside.values() for file in place.glob("*") if file.is_file()})
    return said + "".join(f" {file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def companions(source: Source) -> Iterator[tuple[Path, str]]:
    """Files of the tokenizer, the image processor and generation, and the part of each, "." for none; no strays."""
    if (own := source.folder / FILE).is_file() and source.beside["llm"] != source.folder:
        yield own, "."
    for name, place in source.beside.items():
        for file in sorted(place.glob("*")):
            if file.is_file() and file.name.startswith(COMPANIONS[name]) and not file.name.endswith(WEIGHTS):
                yield file, name
