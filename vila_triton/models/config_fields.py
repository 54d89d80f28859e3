"""The fields of a config.json, read strictly into a dataclass whose annotations say what each may be."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from vila_triton.files.reading import shown

T = TypeVar("T")
KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class ConfigError(ValueError):
    """A config.json says something this code does not know how to honour."""


@contextmanager
def of_folder(folder: Path) -> Iterator[None]:
    """Whatever is wrong with a config in the block is said of the folder it is in."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field may have; NaN is within none."""

    least: float
    most: float
    above: bool = False  # the least itself is not among them

    def hold(self, number: float) -> bool:
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        return f"above {self.least:g} and up to {self.most:g}" if self.above else f"from {self.least} to {self.most}"


Count = Annotated[int, Bounds(1, 2**31 - 1)]
Layers = Annotated[int, Bounds(1, 4096)]
Side = Annotated[int, Bounds(1, 4096)]  # pixels: a picture of 4096 x 4096 is 200 MB as float32
Epsilon = Annotated[float, Bounds(0, 1)]
Factor = Annotated[float, Bounds(0, 1e6, above=True)]
Group = Annotated[int, Bounds(-1, 2**31 - 1)]  # -1: all inputs of a linear


def expected(hint: Any, value: Any) -> str:
    """What a value of a field had to be, "" if it is that. Hints other than of plain values allow everything."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = [expected(x, value) for x in inner if x is not NoneType]
        return "" if "" in words else " or ".join(words)
    if origin is Annotated:
        kind, bounds = inner
        return "" if not expected(kind, value) and bounds.hold(value) else f"{KINDS[kind]} {bounds}"
    if origin is Literal:
        return "" if value in inner else " or ".join(map(repr, inner))
    if origin is list:
        fine = isinstance(value, list) and not any(expected(inner[0], x) for x in value)
        return "" if fine else f"a list, each {expected(inner[0], None)}"
    if hint not in KINDS:
        return ""
    kinds = (int, float) if hint is float else hint
    return "" if isinstance(value, kinds) and (hint is bool or not isinstance(value, bool)) else KINDS[hint]


def read(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from the entries of `values` that it declares; null counts as absent. Errors: `ConfigError`."""
    declared: Any = fields(cls)  # pyright: ignore
    known = {f.name: values[f.name] for f in declared if values.get(f.name) is not None}
    if missing := [f.name for f in declared if f.default is MISSING and f.name not in known]:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    for f in declared:
        if f.name in known and (wanted := expected(f.type, known[f.name])):
            raise ConfigError(f"{where}: {f.name} is {shown(known[f.name])}, expected {wanted}")
    return cls(**known)


def object_in(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """A config within a config, empty if it is null or not there. Errors: `ConfigError`."""
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}: {name} is a {type(value).__name__}, expected an object")
    return value or {}


@dataclass(frozen=True)
class Quantization:
    """What a `quantization_config` in our words says; `modules_to_not_convert` are names of linears that are dense."""

    group_size: Group
    bits: Literal[4] = 4
    order: Literal["sub", "fma"] = "sub"
    modules_to_not_convert: list[str] | None = None


def int4_fields(values: Mapping[str, Any], where: str, orders: tuple[str, ...] = ("sub",)) -> dict[str, Any]:
    """`group_size`, `order` and `dense` of a part whose `quantization_config` says that its linears are int4, else
    nothing. Errors: `ConfigError`.
    """
    said = object_in(values, "quantization_config", where)
    if not said:
        return {}
    if said.get("quant_method") != "vila-triton":
        raise ConfigError(f"{where}: quantization {shown(said.get('quant_method'))} is not supported")
    found = read(Quantization, said, f"{where} quantization_config")
    if not found.group_size:
        raise ConfigError(f"{where} quantization_config: group_size is 0, expected inputs, or -1 for all of them")
    if found.order not in orders:
        names = " or ".join(map(repr, orders))
        raise ConfigError(f"{where} quantization_config: order is {found.order!r}, expected {names}")
    dense = tuple(found.modules_to_not_convert or ())
    return {"group_size": found.group_size, "order": found.order, "dense": dense}
