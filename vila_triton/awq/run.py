"""A checkpoint rounded to int4 layer by layer: one layer is held at a time, and what is finished outlives a kill.

Beside the target stands `target.quantizing` meanwhile: for every finished layer a file, for the next its inputs.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vila_triton import engine
from vila_triton.checkpoint import fitting, require_fits
from vila_triton.layouts import OURS
from vila_triton.models import llama, vila
from vila_triton.models.config import VilaConfig
from vila_triton.models.params import Lazy, leaves, load, tree_map
from vila_triton.quantized import rounded
from vila_triton.shards import part, write_json
from vila_triton.sources import PARTS, Source, quantization
from vila_triton.tensors import open_tensors, read_json
from vila_triton.write import identity

from . import cachefile, ours, upstream
from .calibration import Prompts, weights
from .scales import PLACES
from .tokens import Tokens
from .upstream import Found

FOUND = "awq_cache."  # names in a layer's file of what was found, beside its tensors
Say = Callable[[int, int], None]  # layers finished, layers


@dataclass(frozen=True)
class How:
    """mode "ours" or "upstream"; group: inputs that share a scale; propagate: later layers make good what rounding did
    to earlier ones (ours); image_weight: how much a token of a picture counts, for each 1 of a word's (ours).
    """

    mode: str = "ours"
    group: int = 128
    propagate: bool = True
    image_weight: float = 1.0


def check(source: Source, how: How) -> VilaConfig:
    """The model's geometry. Errors: ValueError if it cannot be rounded so."""
    cfg = require_fits(source)
    if source.group:
        raise ValueError(f"{source.folder} is int4 already; quantize the fp16 checkpoint that it came from")
    if how.mode not in ("ours", "upstream"):
        raise ValueError(f"no mode {how.mode!r}; there are: ours, upstream")
    if how.mode == "upstream" and how.image_weight != 1:
        raise ValueError("upstream's objective weighs all tokens alike; an image weight needs mode ours")
    llama.declare(replace(cfg.llm, group_size=how.group), torch.float16)  # do groups fit the widths?
    return cfg


@torch.no_grad()
def embedded(source: Source, cfg: VilaConfig, shown: Prompts, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the first layer is given for all rows of calibration: [s, e]."""
    specs, features = vila.declare(cfg, dtype), None
    if shown.pixels is not None:
        eyes = (load(getattr(specs, name), *fitting(source, cfg, name), device) for name in PARTS[1:])
        p = vila.Vila(None, *eyes)
        made = [engine.encode_images(p, x.to(device, dtype), cfg) for x in shown.pixels.split(16)]
        features = torch.cat(made).flatten(0, 1)
    table = fitting(source, cfg, "llm")[0][specs.llm.embedding.key]
    row = torch.cat(shown.rows)
    words = table[row.clamp(min=0)].to(device, dtype)  # only these rows of the table are read
    if features is None:
        return words
    row = row.to(device)
    return torch.where((row < 0)[:, None], features[(-1 - row).clamp(min=0)], words)


def layers(source: Source, cfg: VilaConfig, dtype: torch.dtype, device: torch.device, start: int) -> Iterator[Any]:
    """The layers of the language model from `start` on, each read when it is asked for."""
    tensors = fitting(source, cfg, "llm")[0]
    specs = llama.declare(cfg.llm, dtype).layers

    def take(spec: Any) -> Tensor:
        x = tensors[spec.key].to(device, dtype, copy=True)
        tensors.forget(spec.key)
        return x

    for spec in specs[start:]:
        yield tree_map(take, spec)


def stored(path: Path, tensors: dict[str, Tensor], report: dict[str, Any] | None = None) -> None:
    """A safetensors file that is there whole or not at all."""
    held = {name: x.contiguous().cpu() for name, x in tensors.items()}
    save_file(held, part(path), metadata={"report": json.dumps(report, sort_keys=True)})
    part(path).replace(path)


def run(
    source: Source,
    work: Path,
    how: How,
    shown: Prompts,
    device: torch.device,
    say: Say = lambda done, total: None,
    cache: list[Found] | None = None,
) -> Source:
    """The rounded checkpoint, its layers in the folder `work`; called again after a kill, it goes on from there.

    cache: what llm-awq found, instead of a search (mode upstream). Errors: ValueError, naming the layer.
    """
    cfg = check(source, how)
    kind = fitting(source, cfg, "llm")[0].meta[llama.declare(cfg.llm, torch.float16).norm.key].dtype
    dtype = torch.float32 if how.mode == "ours" else kind
    begin(work, source, how, shown, cache)
    total = cfg.llm.num_hidden_layers
    done = sum((work / f"layer-{i:03}.safetensors").exists() for i in range(total))
    tokens = Tokens(tuple(map(len, shown.rows)), weights(shown.rows, how.image_weight).to(device))
    if done < total:
        if not done:
            x = embedded(source, cfg, shown, dtype, device)
            state = {"x": x, "seen": x.clone()} if how.mode == "ours" and how.propagate else {"x": x}
        else:
            state = dict(open_tensors(work / f"inputs-{done:03}.safetensors"))
        state = {name: x.to(device) for name, x in state.items()}
        for i, layer in enumerate(layers(source, cfg, dtype, device, done), done):
            say(i, total)
            try:
                tensors, report, state = one(layer, state, tokens, cfg, how, cache[i] if cache else None)
            except ValueError as error:
                raise ValueError(f"model.layers.{i}: {error}") from None
            specs = llama.declare(replace(cfg.llm, group_size=how.group), kind).layers[i]
            named = {spec.key: as_stored(y, spec) for spec, y in zip(leaves(specs), leaves(tensors.pop("layer")))}
            if i + 1 < total:
                stored(work / f"inputs-{i + 1:03}.safetensors", state)
            stored(work / f"layer-{i:03}.safetensors", named | tensors, report)
            (work / f"inputs-{i:03}.safetensors").unlink(missing_ok=True)
    say(total, total)
    return joined(source, cfg, work, how)


def as_stored(x: Tensor, spec: Any) -> Tensor:
    """Scales stay float16, which they were rounded to; norms and biases get the checkpoint's dtype."""
    return x if x.dtype == torch.float16 or not x.is_floating_point() else x.to(spec.dtype)


def one(
    layer: llama.Layer, state: dict[str, Tensor], tokens: Tokens, cfg: VilaConfig, how: How, found: Found | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """One layer: the rounded one and what was found, its report, and the inputs of the next."""
    if how.mode == "ours":
        x = state["x"]
        r = ours.quantize_layer(layer, x, state.get("seen", x), tokens, cfg.llm, how.group, how.propagate)
        return {"layer": r.layer}, r.report, {"x": r.truth, "seen": r.seen} if how.propagate else {"x": r.truth}
    new, out, found = upstream.quantize_layer(layer, state["x"], tokens, cfg.llm, how.group, found)
    kept = {f"{FOUND}scale.{place}": s for place, s in found.scales.items()}
    kept |= {f"{FOUND}clip.{name}": bound for name, bound in found.clips.items()}
    report = {"scales": {place: {"ratio": r} for place, r in found.ratios.items()}, "linears": {}}
    return {"layer": new, **kept}, report, {"x": out}


def begin(work: Path, source: Source, how: How, shown: Prompts, cache: Any) -> None:
    """The folder of this work. Errors: ValueError if other work was begun there."""
    text = hashlib.sha256(repr((asdict(how), identity(source), [row.tolist() for row in shown.rows])).encode())
    if shown.pixels is not None:
        text.update(shown.pixels.numpy().tobytes())
    for found in cache or ():
        text.update(repr({k: v.tolist() for k, v in (found.scales | found.clips).items()}).encode())
    key = {"key": text.hexdigest()}
    work.mkdir(parents=True, exist_ok=True)
    if (work / "work.json").exists() and read_json(work / "work.json") != key:
        raise ValueError(f"{work} holds the beginnings of other work; remove it, or write elsewhere")
    write_json(work / "work.json", key)


def joined(source: Source, cfg: VilaConfig, work: Path, how: How) -> Source:
    """The source with its layers taken from the files in `work`."""
    specs = llama.declare(cfg.llm, torch.float16)
    old = {spec.key for spec in leaves(specs.layers)}
    held, new = source.tensors["llm"], {}
    for file in sorted(work.glob("layer-*.safetensors")):
        tensors = open_tensors(file)
        new |= {name: tensors for name in tensors if not name.startswith(FOUND)}
    meta = {name: x for name, x in held.meta.items() if name not in old}
    llm = Lazy(
        meta | {name: tensors.meta[name] for name, tensors in new.items()},
        lambda name: new[name][name] if name in new else held[name],
        lambda name: new.get(name, held).forget(name),
    )
    said = source.parts["llm"] | quantization(OURS, how.group, OURS.order)
    return replace(source, parts=source.parts | {"llm": said}, tensors=source.tensors | {"llm": llm}, layout=OURS)


def reports(work: Path) -> list[dict[str, Any]]:
    """What the finished layers say of themselves, in order."""
    found = []
    for file in sorted(work.glob("layer-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.append(json.loads(opened.metadata()["report"]))
    return found


def save_cache(work: Path, file: Path, dtype: torch.dtype) -> None:
    """What mode upstream found, as llm-awq's cache."""
    layers = []
    for path in sorted(work.glob("layer-*.safetensors")):
        held = {n.removeprefix(FOUND): x for n, x in open_tensors(path).items() if n.startswith(FOUND)}
        scales, clips = (
            {n.partition(".")[2]: x for n, x in held.items() if n.startswith(kind)} for kind in ("scale", "clip")
        )
        layers.append(Found(scales, clips, {}))
    cachefile.save(file, layers, dtype)


def finish(work: Path) -> None:
    shutil.rmtree(work)


def nearest(source: Source, cfg: VilaConfig, group: int) -> Source:
    """The checkpoint with every linear of its layers rounded to the nearest level; nothing is computed yet."""
    stems = [
        spec.key.removesuffix(".weight")
        for layer in llama.declare(cfg.llm, torch.float16).layers
        for names in PLACES.values()
        for spec in (getattr(layer, name).weight for name in names)
    ]
    llm = rounded(source.tensors["llm"], stems, group)
    said = source.parts["llm"] | quantization(OURS, group, OURS.order)
    return replace(source, parts=source.parts | {"llm": said}, tensors=source.tensors | {"llm": llm}, layout=OURS)
