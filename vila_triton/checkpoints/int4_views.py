"""The int4 linears of a checkpoint, seen in another layout: each is converted when one of its tensors is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from vila_triton.ops.int4_tiles import TILE_K, tiled_shape

from ..models.params import LazyTensors, LoadError
from ..ops import Int4, dequantize, quantize_rtn
from ..ops.int4 import check_int4_shape
from .int4_layouts import LAYOUTS, NATIVE, Layout, detect_layout

TENSOR_NAMES = sorted({leaf for layout in LAYOUTS.values() for leaf in layout.tensor_names})


def int4_linears(meta: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The int4 linears among some names: the linear -> its leaves -> their full names."""
    linears: dict[str, dict[str, str]] = {}
    for name in meta:
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            linears[stem] = {leaf: f"{stem}.{leaf}" for leaf in TENSOR_NAMES if f"{stem}.{leaf}" in meta}
    return linears


def map_int4_linears(
    tensors: LazyTensors, read: Callable[[Mapping[str, Tensor]], Int4], write: Callable[[Int4], dict[str, Tensor]]
) -> LazyTensors:
    """The same tensors with what `write` makes of each int4 linear in place of its leaves, in their order.

    Errors: `LoadError` naming the linear, now for one whose shapes will not do, later for one whose numbers will not.
    """
    linears = int4_linears(tensors.meta)
    converted_by_shape: dict[tuple, dict[str, Tensor]] = {}  # most linears have the shapes of another

    def tensors_of(stem: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {leaf: source[name] for leaf, name in linears[stem].items()}

    def convert(stem: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return write(read(tensors_of(stem, source)))
        except ValueError as error:
            raise LoadError(f"{stem}: {error}") from None

    meta: dict[str, Tensor] = {}
    origin: dict[str, tuple[str, str]] = {}  # name -> its linear and leaf
    replaced = {name for names in linears.values() for name in names.values()}
    for name, x in tensors.meta.items():
        stem = name.removesuffix(".qweight")
        if name not in replaced:
            meta[name] = x
        elif stem != name:
            signature = tuple((leaf, y.shape, y.dtype) for leaf, y in tensors_of(stem, tensors.meta).items())
            if signature not in converted_by_shape:
                converted_by_shape[signature] = convert(stem, tensors.meta)
            for leaf, y in converted_by_shape[signature].items():
                meta[f"{stem}.{leaf}"] = y
                origin[f"{stem}.{leaf}"] = stem, leaf

    @lru_cache(maxsize=1)  # the leaves of a linear are asked for one after the other
    def convert_once(stem: str) -> dict[str, Tensor]:
        result = convert(stem, tensors)
        for name in linears[stem].values():
            tensors.release(name)
        return result

    def take(name: str) -> Tensor:
        stem, leaf = origin.get(name, ("", ""))
        return convert_once(stem)[leaf] if stem else tensors[name]

    def forget(name: str) -> None:
        if name in tensors.meta:
            tensors.release(name)

    return LazyTensors(meta, take, forget)


def to_native_layout(tensors: LazyTensors, layout: Layout, group_size: int) -> LazyTensors:
    """A checkpoint's tensors under the names and in the layout of ours."""
    return (
        tensors
        if layout is NATIVE
        else map_int4_linears(tensors, lambda leaves: layout.read(leaves, group_size), NATIVE.write)
    )


def from_native_layout(tensors: LazyTensors, layout: Layout, group_size: int) -> LazyTensors:
    """The tensors of ours in another layout."""
    return (
        tensors
        if layout is NATIVE
        else map_int4_linears(tensors, lambda leaves: NATIVE.read(leaves, group_size), layout.write)
    )


def dequantize_linears(tensors: LazyTensors, group_size: int, rounding: Literal["sub", "fma"]) -> LazyTensors:
    """The tensors of ours with every int4 weight written out, in the dtype of its scales."""

    def write(w: Int4) -> dict[str, Tensor]:
        return {"weight": dequantize(replace(w, order=rounding), w.scales.dtype)}

    return map_int4_linears(tensors, lambda leaves: NATIVE.read(leaves, group_size), write)


def detect_int4(meta: Mapping[str, Tensor], where: str, configured: int = 0) -> tuple[Layout, int] | None:
    """The layout and group size of a checkpoint's int4 linears, None if it has none; `group`: what its config says,
    -1 for one group a row.

    Errors: `LoadError` if they are of no layout, or not all alike, or not what the config says.
    """
    stem_of: dict[tuple[str, int], str] = {}
    detected_by_shape: dict[tuple, tuple[str, int]] = {}
    for stem, names in int4_linears(meta).items():
        linear_tensors = {leaf: meta[name] for leaf, name in names.items()}
        signature = tuple((leaf, x.shape, x.dtype) for leaf, x in linear_tensors.items())
        if signature not in detected_by_shape:
            try:
                layout = detect_layout(linear_tensors)
                detected_by_shape[signature] = (
                    layout.name,
                    reported_group_size(layout.read(linear_tensors, configured), configured),
                )
            except ValueError as error:
                raise LoadError(f"{where}: {stem}: {error}") from None
        stem_of.setdefault(detected_by_shape[signature], stem)
    descriptions = [f"{stem} is {name} in groups of {group_size}" for (name, group_size), stem in stem_of.items()]
    if len(descriptions) > 1:
        raise LoadError(f"{where}: {descriptions[0]}, but {descriptions[1]}; all int4 linears must be alike")
    if not stem_of:
        return None
    ((name, size),) = stem_of
    if configured and configured != size:
        raise LoadError(f"{where}: the config says groups of {configured}, but {descriptions[0]}")
    return LAYOUTS[name], size


def reported_group_size(w: Int4, configured: int) -> int:
    """The group size of a weight, -1 if that is said and its rows are a group each. Errors: ValueError."""
    k = w.shape[1]
    if configured != -1 or w.group_size != k:
        return w.group_size
    if k % TILE_K:
        raise ValueError(f"one group a row of {k} inputs is not supported (of multiples of {TILE_K} it is)")
    return -1


def quantize_linears_rtn(tensors: LazyTensors, stems: list[str], group_size: int) -> LazyTensors:
    """The same tensors with the weights of some linears rounded to the nearest of 16 levels, in the layout of ours."""
    meta: dict[str, Tensor] = {}
    origin: dict[str, tuple[str, str]] = {}
    for name, x in tensors.meta.items():
        stem = name.removesuffix(".weight")
        if stem not in stems:
            meta[name] = x
            continue
        n, k = x.shape
        check_int4_shape(k, group_size)
        for leaf, shape, dtype in (
            ("qweight", tiled_shape(n, k), torch.int32),
            ("scales", (k // group_size, n), x.dtype),
            ("zeros", (k // group_size, n), x.dtype),
        ):
            meta[f"{stem}.{leaf}"] = torch.empty(shape, dtype=dtype, device="meta")
            origin[f"{stem}.{leaf}"] = stem, leaf

    @lru_cache(maxsize=1)
    def quantize_once(stem: str) -> Int4:
        return quantize_rtn(tensors[f"{stem}.weight"], group_size)

    def take(name: str) -> Tensor:
        stem, leaf = origin.get(name, ("", ""))
        return getattr(quantize_once(stem), leaf) if stem else tensors[name]

    return LazyTensors(meta, take, lambda name: tensors.release(name) if name in tensors.meta else None)
