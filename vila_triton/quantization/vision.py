"""The picture tower and the projector in int4: every linear is rounded knowing its inputs, and nothing is made louder.

AWQ's scales have no place between the linears of an MLP here, which are a GELU apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.checkpoints.loading import fitting, geometry
from vila_triton.checkpoints.sources import Source
from vila_triton.engine.engine import kernels
from vila_triton.models import projector, vision
from vila_triton.models.config import VilaConfig, VisionConfig
from vila_triton.models.layers import Affine, Linear, linear
from vila_triton.models.params import Lazy, Spec, leaves, tree_map

from .awq_gptq import AT_ONCE as WEIGHTS
from .awq_gptq import round_linear, written_out
from .hessian import moments, stand_in
from .resumable import How, State, Step, Steps, dtype_of, taking

ROOM = 1 << 14  # positions of the tower, and of the projector, that each is calibrated on at most
AT_ONCE = 16  # pictures that run through the tower together
T = TypeVar("T")


def padded(source: Source, cfg: VisionConfig, group: int) -> Source:
    """The same tower, the MLPs of its layers widened to whole groups: SigLIP's are 4,304 wide, 16 times a prime.

    What is added is zero before the activation and after, so nothing that is computed changes.
    """
    more = -cfg.intermediate_size % group
    if not more:
        return source
    held = source.tensors["vision_tower"]
    sides = {".mlp.fc1.weight": (0, 0, 0, more), ".mlp.fc1.bias": (0, more), ".mlp.fc2.weight": (0, more)}

    def widened(name: str, x: Tensor) -> Tensor:
        return next((F.pad(x, side) for end, side in sides.items() if name.endswith(end)), x)

    meta = {name: widened(name, x) for name, x in held.meta.items()}
    wide = Lazy(meta, lambda name: widened(name, held[name]), held.forget)
    said = source.parts["vision_tower"] | {"intermediate_size": cfg.intermediate_size + more}
    return replace(source, parts=source.parts | {"vision_tower": said}, tensors=source.tensors | {"vision_tower": wide})


def positions(cfg: VisionConfig) -> int:
    """Of the tower that a picture takes, in all of its tiles."""
    tiles = sum((side // cfg.tile) ** 2 for side in cfg.scales) or 1
    return tiles * (cfg.grid**2 + cfg.class_tokens)


def some(pixels: Tensor, each: int) -> Tensor:
    """Of pictures [n, c, H, W] that take `each` positions every so manyth, so that they take no more than `ROOM`."""
    return pixels[:: -(-len(pixels) // max(1, ROOM // each))]


class Layers(Sequence[Any]):
    """The layers of a tower, each read when it comes up."""

    def __init__(self, specs: Sequence[Any], take: Callable[[Spec], Tensor]) -> None:
        self.specs, self.take = specs, take

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Layers(self.specs[at], self.take)
        return tree_map(self.take, self.specs[at])


def streamed(source: Source, device: torch.device, dtype: torch.dtype) -> tuple[Any, VilaConfig]:
    """A tower that holds no more than one of its layers, and the geometry of its model."""
    cfg = geometry(source.top, source.parts)
    take = taking(fitting(source, cfg, "vision_tower")[0], device)
    specs = vision.declare(cfg.vision_tower, dtype)
    rest = tree_map(take, replace(specs, layers=()))
    return replace(rest, layers=Layers(specs.layers, take)), cfg


def rounded(
    tree: T, specs: T, f: Callable[[T, Tensor, Linear], Tensor], state: State, group: int, propagate: bool
) -> Step:
    """The tree with every linear that f(tree, x, linear) applies in int4, each rounded when f comes to it.

    tree: in any dtype; the work is done in that of `x`.
    state: `x`, what f is given, and with `propagate` `seen`, what it is given where all before is rounded: a linear
    then learns from the inputs that the rounded ones before it give, and makes good what they spoilt.
    """
    tree = tree_map(lambda leaf: leaf.to(state["x"].dtype), tree)
    keys = [spec.key.split(".")[-3:-1] for spec in leaves(specs)]
    names = {id(leaf): ".".join(key) for leaf, key in zip(leaves(tree), keys, strict=True)}
    given: dict[int, Tensor] = {}
    made: dict[int, Any] = {}
    report: dict[str, Any] = {"scales": {}, "linears": {}}
    last: Any = (None, None, None)  # an input, its moments and what stands in for it: q, k and v share theirs

    def turned(p: Affine, y: Tensor) -> Affine:
        nonlocal last
        key, at_once = id(p.weight), max(WEIGHTS, p.weight.numel() // 8)
        if last[0] is not y:
            got, wanted = y.flatten(0, -2), given[key].flatten(0, -2)
            each = torch.ones(len(got), device=y.device)
            known = moments(got, each, group)
            last = y, known, stand_in(wanted, got, each, known) if propagate else None
        try:
            made[key], report["linears"][names[key]] = round_linear(p.weight, last[2], last[1], group, at_once)
        except ValueError as error:
            raise ValueError(f"{names[key]}: {error}") from None
        return Affine(written_out(made[key], y.dtype, at_once), p.bias)

    def watched(p: Affine, y: Tensor) -> Tensor:
        given[id(p.weight)] = y
        if not propagate:
            turned(p, y)
        return linear(p, y)

    with kernels(state["x"].device):  # attention that holds no scores of all tiles at once
        out = {"x": f(tree, state["x"], watched)}
        if propagate:
            out["seen"] = f(tree, state["seen"], lambda p, y: linear(turned(p, y), y))
    return Step(tree_map(lambda leaf: made.get(id(leaf), leaf), tree), report, out, {})


def tower(source: Source, cfg: VilaConfig, how: How, pixels: Tensor, device: torch.device) -> Steps:
    """A step for each layer, in float32, on what the layers see of some of calibration's pictures [n, c, H, W]."""
    of, kind = cfg.vision_tower, vision.KINDS[cfg.vision_tower.model_type]
    dtype = dtype_of(source, "vision_tower")
    before = vision.declare(of, dtype).layers

    def start() -> State:
        p, _ = streamed(source, device, torch.float32)
        seen = vision.tiles(some(pixels, positions(of)).to(device, torch.float32), of)
        x = torch.cat([kind.embed(p, tiles, of) for tiles in seen])
        return {"x": x, "seen": x.clone()} if how.propagate else {"x": x}

    def one(i: int, layer: Any, state: State) -> Step:
        def through(p: Any, x: Tensor, linear: Linear) -> Tensor:
            return kind.block(p, x, of, linear)

        return rounded(layer, before[i], through, state, how.group, how.propagate)

    after = vision.declare(replace(of, group_size=how.group), dtype).layers
    return Steps("vision_tower", how.group, before, after, start, one)


def connector(source: Source, made: Source, cfg: VilaConfig, how: How, pixels: Tensor, device: torch.device) -> Steps:
    """One step: the projector, in float32. made: the source, its tower rounded if it is to be."""
    of, dtype = cfg.mm_projector, dtype_of(source, "mm_projector")

    def features(source: Source) -> Tensor:
        p, own = streamed(source, device, torch.float32)
        shown = some(pixels, cfg.image_tokens).to(device, torch.float32).split(AT_ONCE)
        with kernels(device):
            return torch.cat([vision.vision_tower(p, x, own.vision_tower) for x in shown])

    def one(_: int, p: Any, state: State) -> Step:
        def through(p: Any, x: Tensor, linear: Linear) -> Tensor:
            return projector.projector(p, x, of, linear)

        return rounded(p, before, through, state, how.group, how.propagate)

    before = projector.declare(of, dtype)
    after = projector.declare(replace(of, group_size=how.group), dtype)
    return Steps(
        "mm_projector",
        how.group,
        (before,),
        (after,),
        lambda: {"x": features(source), "seen": features(made)} if how.propagate else {"x": features(source)},
        one,
    )
