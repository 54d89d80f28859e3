"""Views of a checkpoint's tensors with its linears in another layout; each linear is converted when it is read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor

from vila_triton.models.params import LazyTensors, LoadError
from vila_triton.ops import Int4, dequantize
from vila_triton.ops.int4_tiles import TILE_K

from .int4_layouts import LAYOUTS, NATIVE, Layout, detect_layout

TENSOR_NAMES = sorted({name for layout in LAYOUTS.values() for name in layout.tensor_names})


def int4_linears(meta: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The int4 linears among named tensors: linear -> last part of a tensor's name -> its full name."""
    linears = (name.removesuffix(".qweight") for name in meta if name.endswith(".qweight"))
    return {stem: {last: f"{stem}.{last}" for last in TENSOR_NAMES if f"{stem}.{last}" in meta} for stem in linears}


class ConvertedLinears:
    """The tensors of a checkpoint in which those of some linears are replaced by converted ones.

    linears: linear -> the full names of its tensors, the first of which gives the new ones their place in the order.
    convert(linear, tensors): the new tensors by the last part of their names; also called with tensors on the meta
    device, for shapes and dtypes. A linear is converted when one of its tensors is read. The last result is kept, since
    the tensors of a linear are read one after the other.
    """

    def __init__(
        self,
        tensors: LazyTensors,
        linears: Mapping[str, Iterable[str]],
        convert: Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> None:
        self.tensors, self.convert = tensors, convert
        self.linears = {stem: tuple(names) for stem, names in linears.items()}
        self.origin: dict[str, tuple[str, str]] = {}  # new name -> its linear, and the last part of the name
        self.last: tuple[str, Mapping[str, Tensor]] = "", {}
        self.meta = dict(self._meta())

    def _meta(self) -> Iterable[tuple[str, Tensor]]:
        converted_by_shape: dict[tuple, Mapping[str, Tensor]] = {}  # most linears have the shapes of another
        first = {names[0]: stem for stem, names in self.linears.items()}
        replaced = {name for names in self.linears.values() for name in names}
        for name, x in self.tensors.meta.items():
            if name not in replaced:
                yield name, x
            elif name in first:
                stem = first[name]
                old = {name.removeprefix(stem): self.tensors.meta[name] for name in self.linears[stem]}
                signature = tuple((last, x.shape, x.dtype) for last, x in old.items())
                if signature not in converted_by_shape:
                    converted_by_shape[signature] = self.convert(stem, self.tensors.meta)
                for last, x in converted_by_shape[signature].items():
                    self.origin[f"{stem}.{last}"] = stem, last
                    yield f"{stem}.{last}", x

    def read(self, name: str) -> Tensor:
        if name not in self.origin:
            return self.tensors[name]
        stem, last = self.origin[name]
        if self.last[0] != stem:
            self.last = stem, self.convert(stem, self.tensors)
            for old in self.linears[stem]:
                self.tensors.release(old)
        return self.last[1][last]

    def release(self, name: str) -> None:
        if name in self.tensors.meta:
            self.tensors.release(name)

    def view(self) -> LazyTensors:
        return LazyTensors(self.meta, self.read, self.release)


def map_int4_linears(
    tensors: LazyTensors, read: Callable[[Mapping[str, Tensor]], Int4], write: Callable[[Int4], dict[str, Tensor]]
) -> LazyTensors:
    """The same tensors with write(read(...)) of each int4 linear in place of its own.

    Errors: `LoadError` naming the linear, now for shapes that do not fit, when it is read for values that do not.
    """
    linears = int4_linears(tensors.meta)

    def convert(stem: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return write(read({last: source[name] for last, name in linears[stem].items()}))
        except ValueError as error:
            raise LoadError(f"{stem}: {error}") from None

    return ConvertedLinears(tensors, {stem: names.values() for stem, names in linears.items()}, convert).view()


def to_native_layout(tensors: LazyTensors, layout: Layout, group_size: int) -> LazyTensors:
    """View int4 linears of a layout in the native one."""
    if layout is NATIVE:
        return tensors
    return map_int4_linears(tensors, lambda linear: layout.read(linear, group_size), NATIVE.write)


def from_native_layout(tensors: LazyTensors, layout: Layout, group_size: int) -> LazyTensors:
    """View native int4 linears in another layout."""
    if layout is NATIVE:
        return tensors
    return map_int4_linears(tensors, lambda linear: NATIVE.read(linear, group_size), layout.write)


def dequantize_linears(tensors: LazyTensors, group_size: int, rounding: Literal["sub", "fma"]) -> LazyTensors:
    """View native int4 linears as dequantized weights, in the dtype of their scales."""

    def write(w: Int4) -> dict[str, Tensor]:
        return {"weight": dequantize(replace(w, rounding=rounding), w.scales.dtype)}

    return map_int4_linears(tensors, lambda linear: NATIVE.read(linear, group_size), write)


def quantize_linears_rtn(tensors: LazyTensors, stems: Iterable[str], group_size: int) -> LazyTensors:
    """View some linears as int4 in the native layout, rounded to nearest. Errors: ValueError for a group size."""

    def convert(stem: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return NATIVE.write(Int4.pack(source[f"{stem}.weight"], group_size))

    return ConvertedLinears(tensors, {stem: (f"{stem}.weight",) for stem in stems}, convert).view()


def detect_int4(meta: Mapping[str, Tensor], where: str, configured: int = 0) -> tuple[Layout, int] | None:
    """Detect the layout and the group size of a checkpoint's int4 linears; None if it has none.

    configured: the group size that its config says, -1 for one group a row, 0 for nothing.
    Errors: `LoadError` if they are of no known layout, not all alike, or not as the config says.
    """
    stem_of: dict[tuple[str, int], str] = {}
    detected_by_shape: dict[tuple, tuple[str, int]] = {}
    for stem, names in int4_linears(meta).items():
        tensors = {last: meta[name] for last, name in names.items()}
        signature = tuple((last, x.shape, x.dtype) for last, x in tensors.items())
        if signature not in detected_by_shape:
            try:
                layout = detect_layout(tensors)
                group_size = reported_group_size(layout.read(tensors, configured), configured)
            except ValueError as error:
                raise LoadError(f"{where}: {stem}: {error}") from None
            detected_by_shape[signature] = layout.name, group_size
        stem_of.setdefault(detected_by_shape[signature], stem)
    descriptions = [f"{stem} is {name} in groups of {group_size}" for (name, group_size), stem in stem_of.items()]
    if len(descriptions) > 1:
        raise LoadError(f"{where}: {descriptions[0]}, but {descriptions[1]}; all int4 linears must be alike")
    if not stem_of:
        return None
    ((name, group_size),) = stem_of
    if configured and configured != group_size:
        raise LoadError(f"{where}: the config says groups of {configured}, but {descriptions[0]}")
    return LAYOUTS[name], group_size


def reported_group_size(w: Int4, configured: int) -> int:
    """The group size of a weight, or -1 if that is configured and each row is one group. Errors: ValueError."""
    k = w.shape[1]
    if configured != -1 or w.group_size != k:
        return w.group_size
    if k % TILE_K:
        raise ValueError(f"one group a row of {k} inputs is not supported (of multiples of {TILE_K} it is)")
    return -1
