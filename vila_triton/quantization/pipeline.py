"""A checkpoint rounded to int4 layer by layer: one layer is held at a time, and what is finished outlives a kill."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.checkpoints.int4_views import rounded
from vila_triton.checkpoints.loading import fitting, geometry, require_fits
from vila_triton.checkpoints.sources import PARTS, Source
from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.checkpoints.writing import identity
from vila_triton.engine import engine
from vila_triton.models import llama, projector, vila, vision
from vila_triton.models.config import VilaConfig
from vila_triton.models.params import leaves, load

from . import awq_cache_file, awq_gptq, llm_awq
from . import vision as seeing
from .activations import Tokens
from .calibration_data import Prompts, weights
from .llm_awq import Found
from .resumable import FOUND, How, State, Step, Steps, begun, carry_out, dtype_of, prefix_of, with_int4

DECLARE: dict[str, Any] = {"llm": llama, "vision_tower": vision, "mm_projector": projector}
Say = Callable[[int, int], None]  # steps finished, steps


def opened(source: Source, how: How) -> Source:
    """The checkpoint as it is to be rounded, its tower widened if that is among it. Errors: ValueError if it cannot."""
    cfg, parts = require_fits(source), ("llm", *how.also)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"no part {part!r}; there are: {', '.join(PARTS)}")
        if source.group(part):
            said = "" if part == "llm" else f": {part}"
            raise ValueError(f"{source.folder} is int4 already{said}; quantize the fp16 checkpoint that it came from")
    if how.mode not in ("ours", "upstream"):
        raise ValueError(f"no mode {how.mode!r}; there are: ours, upstream")
    if how.mode == "upstream" and not how.propagate:
        raise ValueError("upstream never carries errors on; leave propagate as it is")
    if how.mode == "upstream" and (how.image_weight != 1 or how.also):
        what = f"has no place for {', '.join(how.also)}" if how.also else "weighs all tokens alike"
        raise ValueError(f"upstream's objective {what}; that needs mode ours")
    if "vision_tower" in how.also:
        source = seeing.padded(source, cfg.vision_tower, how.group)
    for part in parts:
        try:
            keys = [spec.key for spec in leaves(declared(source, part, how.group))]
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
        if not any(key.endswith(".qweight") for key in keys):
            raise ValueError(f"{part} has no linear that could be rounded")
    return source


def looked_at(cfg: VilaConfig, how: How, pixels: Tensor) -> dict[str, int]:
    """By how many of calibration's pictures the parts that see are rounded."""
    each = {"vision_tower": seeing.positions(cfg.vision_tower), "mm_projector": cfg.image_tokens}
    return {part: len(seeing.some(pixels, each[part])) for part in how.also}


def declared(source: Source, part: str, group: int | None = None) -> Any:
    """A part's tree, its linears in int4 if a group size is given."""
    cfg, module = getattr(geometry(source.top, source.parts), part), DECLARE[part]
    return module.declare(replace(cfg, group_size=group), dtype_of(source, part))


def embedded(source: Source, shown: Prompts, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the first layer is given for all rows of calibration: [s, e]."""
    cfg, features = geometry(source.top, source.parts), None
    specs = vila.declare(cfg, dtype)
    if shown.pixels is not None:
        tower, _ = seeing.streamed(source, device, dtype)
        p = vila.Vila(None, tower, load(specs.mm_projector, *fitting(source, cfg, "mm_projector"), device))
        made = [engine.encode_images(p, x.to(device, dtype), cfg) for x in shown.pixels.split(seeing.AT_ONCE)]
        features = torch.cat(made).flatten(0, 1)
    table = fitting(source, cfg, "llm")[0][specs.llm.embedding.key]
    row = torch.cat(shown.rows)
    words = table[row.clamp(min=0)].to(device, dtype)  # only these rows of the table are read
    if features is None:
        return words
    row = row.to(device)
    return torch.where((row < 0)[:, None], features[(-1 - row).clamp(min=0)], words)


@torch.no_grad()
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
    source = made = opened(source, how)
    cfg, pixels = geometry(source.top, source.parts), shown.pixels
    if how.also and pixels is None:
        raise ValueError(f"{', '.join(how.also)}: rounded by what it sees, but calibration has no pictures")
    tokens = Tokens(tuple(map(len, shown.rows)), weights(shown.rows, how.image_weight).to(device))
    if how.mode == "upstream" and cache is None and sum(tokens.lengths) < llm_awq.CLIP_TOKENS:
        raise ValueError(
            f"upstream's clipping needs {llm_awq.CLIP_TOKENS} tokens of calibration, there are {sum(tokens.lengths)}"
        )
    kept = [x for found in cache or () for pair in (found.scales | found.clips).items() for x in pair]
    with begun(work, how, identity(source), *shown.rows, *(() if pixels is None else (pixels,)), *kept):
        sizes = {"vision_tower": cfg.vision_tower.num_hidden_layers, "mm_projector": 1}
        before, total = 0, cfg.llm.num_hidden_layers + sum(sizes[part] for part in how.also)
        for part in (*sorted(how.also, reverse=True), "llm"):
            if part == "llm" or pixels is None:
                steps = language(source, made, cfg, how, shown, tokens, device, cache)
            elif part == "vision_tower":
                steps = seeing.tower(source, cfg, how, pixels, device)
            else:
                steps = seeing.connector(source, made, cfg, how, pixels, device)
            made = carry_out(steps, made, work, device, lambda done, before=before: say(before + done, total))
            before += len(steps.before)
        say(total, total)
    return made


def language(
    source: Source,
    made: Source,
    cfg: VilaConfig,
    how: How,
    shown: Prompts,
    tokens: Tokens,
    device: torch.device,
    cache: list[Found] | None,
) -> Steps:
    """A step for each layer of the language model. made: the source, rounded already what sees."""
    kind = dtype_of(source, "llm")
    dtype = torch.float32 if how.mode == "ours" else kind

    def start() -> State:
        x = embedded(source, shown, dtype, device)
        if how.mode != "ours" or not how.propagate:
            return {"x": x}
        return {"x": x, "seen": embedded(made, shown, dtype, device) if how.also else x.clone()}

    def one(i: int, layer: llama.Layer, state: State) -> Step:
        x = state["x"]
        if how.mode == "ours":
            r = awq_gptq.quantize_layer(layer, x, state.get("seen", x), tokens, cfg.llm, how.group, how.propagate)
            return Step(r.layer, r.report, {"x": r.truth, "seen": r.seen} if how.propagate else {"x": r.truth}, {})
        known = cache[i].to(device) if cache else None
        new, out, found = llm_awq.quantize_layer(layer, x, tokens, cfg.llm, how.group, known)
        kept = {f"scale.{place}": s for place, s in found.scales.items()}
        kept |= {f"clip.{name}": bound for name, bound in found.clips.items()}
        report = {"scales": {place: {"ratio": r} for place, r in found.ratios.items()}, "linears": {}}
        return Step(new, report, {"x": out}, kept)

    before, after = (declared(source, "llm", group).layers for group in (None, how.group))
    return Steps("llm", how.group, before, after, start, one)


def save_cache(work: Path, file: Path) -> None:
    """What mode upstream found, as llm-awq's cache."""
    layers = []
    for path in sorted(work.glob("llm-*.safetensors")):
        held = {n.removeprefix(FOUND): x for n, x in open_tensors(path).items() if n.startswith(FOUND)}
        scales, clips = (
            {n.partition(".")[2]: x for n, x in held.items() if n.startswith(kind)} for kind in ("scale", "clip")
        )
        layers.append(Found(scales, clips, {}))
    awq_cache_file.save(file, layers)


def nearest(source: Source, how: How) -> Source:
    """The checkpoint with every linear rounded to the nearest level; nothing is computed yet."""
    made = source = opened(source, how)
    for part in ("llm", *how.also):
        keys = [spec.key for spec in leaves(declared(source, part, how.group))]
        prefix = prefix_of(source, part)
        stems = [prefix + key.removesuffix(".qweight") for key in keys if key.endswith(".qweight")]
        made = with_int4(made, part, rounded(source.tensors[part], stems, how.group), how.group)
    return made
