"""The int4 linears of a checkpoint, seen in another layout: each is converted when one of its tensors is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..models.params import Lazy, LoadError
from ..ops import Int4, dequantize, quantize
from ..ops.int4 import check_int4
from .int4_layouts import LAYOUTS, OURS, Layout, layout_of
from .int4_packing import TILE_K, tiles

LEAVES = sorted({leaf for layout in LAYOUTS.values() for leaf in layout.leaves})


def linears(meta: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The int4 linears among some names: the linear -> its leaves -> their full names."""
    found: dict[str, dict[str, str]] = {}
    for name in meta:
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            found[stem] = {leaf: f"{stem}.{leaf}" for leaf in LEAVES if f"{stem}.{leaf}" in meta}
    return found


def converted(
    tensors: Lazy, read: Callable[[Mapping[str, Tensor]], Int4], write: Callable[[Int4], dict[str, Tensor]]
) -> Lazy:
    """The same tensors with what `write` makes of each int4 linear in place of its leaves, in their order.

    Errors: `LoadError` naming the linear, now for one whose shapes will not do, later for one whose numbers will not.
    """
    found = linears(tensors.meta)
    known: dict[tuple, dict[str, Tensor]] = {}  # most linears have the shapes of another

    def leaves(stem: str, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {leaf: of[name] for leaf, name in found[stem].items()}

    def convert(stem: str, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return write(read(leaves(stem, of)))
        except ValueError as error:
            raise LoadError(f"{stem}: {error}") from None

    meta: dict[str, Tensor] = {}
    origin: dict[str, tuple[str, str]] = {}  # name -> its linear and leaf
    old = {name for names in found.values() for name in names.values()}
    for name, x in tensors.meta.items():
        stem = name.removesuffix(".qweight")
        if name not in old:
            meta[name] = x
        elif stem != name:
            shapes = tuple((leaf, y.shape, y.dtype) for leaf, y in leaves(stem, tensors.meta).items())
            if shapes not in known:
                known[shapes] = convert(stem, tensors.meta)
            for leaf, y in known[shapes].items():
                meta[f"{stem}.{leaf}"] = y
                origin[f"{stem}.{leaf}"] = stem, leaf

    @lru_cache(maxsize=1)  # the leaves of a linear are asked for one after the other
    def whole(stem: str) -> dict[str, Tensor]:
        made = convert(stem, tensors)
        for name in found[stem].values():
            tensors.forget(name)
        return made

    def take(name: str) -> Tensor:
        stem, leaf = origin.get(name, ("", ""))
        return whole(stem)[leaf] if stem else tensors[name]

    def forget(name: str) -> None:
        if name in tensors.meta:
            tensors.forget(name)

    return Lazy(meta, take, forget)


def decoded(tensors: Lazy, layout: Layout, group: int) -> Lazy:
    """A checkpoint's tensors under the names and in the layout of ours."""
    return tensors if layout is OURS else converted(tensors, lambda leaves: layout.read(leaves, group), OURS.write)


def encoded(tensors: Lazy, layout: Layout, group: int) -> Lazy:
    """The tensors of ours in another layout."""
    return tensors if layout is OURS else converted(tensors, lambda leaves: OURS.read(leaves, group), layout.write)


def dense(tensors: Lazy, group: int, order: Literal["sub", "fma"]) -> Lazy:
    """The tensors of ours with every int4 weight written out, in the dtype of its scales."""

    def write(w: Int4) -> dict[str, Tensor]:
        return {"weight": dequantize(replace(w, order=order), w.scales.dtype)}

    return converted(tensors, lambda leaves: OURS.read(leaves, group), write)


def survey(meta: Mapping[str, Tensor], where: str, group: int = 0) -> tuple[Layout, int] | None:
    """The layout and group size of a checkpoint's int4 linears, None if it has none; `group`: what its config says,
    -1 for one group a row.

    Errors: `LoadError` if they are of no layout, or not all alike, or not what the config says.
    """
    found: dict[tuple[str, int], str] = {}
    known: dict[tuple, tuple[str, int]] = {}
    for stem, names in linears(meta).items():
        leaves = {leaf: meta[name] for leaf, name in names.items()}
        shapes = tuple((leaf, x.shape, x.dtype) for leaf, x in leaves.items())
        if shapes not in known:
            try:
                layout = layout_of(leaves)
                known[shapes] = layout.name, group_said(layout.read(leaves, group), group)
            except ValueError as error:
                raise LoadError(f"{where}: {stem}: {error}") from None
        found.setdefault(known[shapes], stem)
    kinds = [f"{stem} is {name} in groups of {size}" for (name, size), stem in found.items()]
    if len(kinds) > 1:
        raise LoadError(f"{where}: {kinds[0]}, but {kinds[1]}; all int4 linears must be alike")
    if not found:
        return None
    ((name, size),) = found
    if group and group != size:
        raise LoadError(f"{where}: the config says groups of {group}, but {kinds[0]}")
    return LAYOUTS[name], size


def group_said(w: Int4, said: int) -> int:
    """The group size of a weight, -1 if that is said and its rows are a group each. Errors: ValueError."""
    k = w.shape[1]
    if said != -1 or w.group != k:
        return w.group
    if k % TILE_K:
        raise ValueError(f"one group a row of {k} inputs is not supported (of multiples of {TILE_K} it is)")
    return -1


def rounded(tensors: Lazy, stems: list[str], group: int) -> Lazy:
    """The same tensors with the weights of some linears rounded to the nearest of 16 levels, in the layout of ours."""
    meta: dict[str, Tensor] = {}
    origin: dict[str, tuple[str, str]] = {}
    for name, x in tensors.meta.items():
        stem = name.removesuffix(".weight")
        if stem not in stems:
            meta[name] = x
            continue
        n, k = x.shape
        check_int4(k, group)
        for leaf, shape, dtype in (
            ("qweight", tiles(n, k), torch.int32),
            ("scales", (k // group, n), x.dtype),
            ("zeros", (k // group, n), x.dtype),
        ):
            meta[f"{stem}.{leaf}"] = torch.empty(shape, dtype=dtype, device="meta")
            origin[f"{stem}.{leaf}"] = stem, leaf

    @lru_cache(maxsize=1)
    def whole(stem: str) -> Int4:
        return quantize(tensors[f"{stem}.weight"], group)

    def take(name: str) -> Tensor:
        stem, leaf = origin.get(name, ("", ""))
        return getattr(whole(stem), leaf) if stem else tensors[name]

    return Lazy(meta, take, lambda name: tensors.forget(name) if name in tensors.meta else None)
