"""Read fields of a config.json strictly into a dataclass, whose type annotations say which values are allowed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from vila_triton.files.reading import short_repr

Config = TypeVar("Config")
TYPE_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class ConfigError(ValueError):
    """A config.json holds a value that is not supported."""


@contextmanager
def name_folder_in_errors(folder: Path) -> Iterator[None]:
    """Prefix every `ConfigError` raised inside with the folder of the config."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None


@dataclass(frozen=True)
class Bounds:
    """The range of numbers that a field may have: from `minimum` to `maximum`, without `minimum` itself if `exclusive`.
    NaN is outside.
    """

    minimum: float
    maximum: float
    exclusive: bool = False

    def contains(self, number: float) -> bool:
        """Return whether the number is in range."""
        return self.minimum <= number <= self.maximum and not (self.exclusive and number == self.minimum)

    def __str__(self) -> str:
        if self.exclusive:
            return f"above {self.minimum:g} and up to {self.maximum:g}"
        return f"from {self.minimum} to {self.maximum}"


Count = Annotated[int, Bounds(1, 2**31 - 1)]
LayerCount = Annotated[int, Bounds(1, 4096)]
PixelCount = Annotated[int, Bounds(1, 4096)]  # per side: an image of 4096 x 4096 is 200 MB as float32
Epsilon = Annotated[float, Bounds(0, 1)]
PositiveFactor = Annotated[float, Bounds(0, 1e6, exclusive=True)]
GroupSize = Annotated[int, Bounds(-1, 2**31 - 1)]  # -1: all inputs of a linear


def expected_instead(hint: Any, value: Any) -> str:
    """Describe the values that a field of type `hint` may have, or return "" if `value` is one of them.

    Type hints of other than plain JSON values allow everything.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        alternatives = [expected_instead(x, value) for x in inner if x is not NoneType]
        return "" if "" in alternatives else " or ".join(alternatives)
    if origin is Annotated:
        plain_type, bounds = inner
        matches = not expected_instead(plain_type, value) and bounds.contains(value)
        return "" if matches else f"{TYPE_NAMES[plain_type]} {bounds}"
    if origin is Literal:
        return "" if value in inner else " or ".join(map(repr, inner))
    if origin is list:
        matches = isinstance(value, list) and not any(expected_instead(inner[0], x) for x in value)
        return "" if matches else f"a list, each {expected_instead(inner[0], None)}"
    if hint not in TYPE_NAMES:
        return ""
    matches = isinstance(value, (int, float) if hint is float else hint) and (hint is bool) == isinstance(value, bool)
    return "" if matches else TYPE_NAMES[hint]


def read_dataclass(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build a dataclass from those entries of `values` that are its fields; null counts as absent.

    Errors: `ConfigError` beginning with `source`, for a missing field and for a value that the field's annotation does
    not allow.
    """
    schema: Any = fields(cls)  # pyright: ignore
    present = {f.name: values[f.name] for f in schema if values.get(f.name) is not None}
    if missing := [f.name for f in schema if f.default is MISSING and f.name not in present]:
        raise ConfigError(f"{source}: missing {', '.join(missing)}")
    for f in schema:
        if f.name in present and (expectation := expected_instead(f.type, present[f.name])):
            raise ConfigError(f"{source}: {f.name} is {short_repr(present[f.name])}, expected {expectation}")
    return cls(**present)


def nested_object(values: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """Return the object under a key of a config, {} if it is absent or null. Errors: `ConfigError`."""
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{source}: {name} is a {type(value).__name__}, expected an object")
    return value or {}


@dataclass(frozen=True)
class QuantizationSettings:
    """A `quantization_config` in the format of vila-triton. Field names are the file's keys."""

    group_size: GroupSize
    bits: Literal[4] = 4
    order: Literal["sub", "fma"] = "sub"
    modules_to_not_convert: list[str] | None = None


def quantization_fields(
    values: Mapping[str, Any], source: str, roundings: tuple[str, ...] = ("sub",)
) -> dict[str, Any]:
    """Read a part's `quantization_config` into the fields `group_size`, `rounding` and `dense_linears`; {} if the part
    has none.

    roundings: the values that are supported for this part. Errors: `ConfigError`.
    """
    quantization = nested_object(values, "quantization_config", source)
    if not quantization:
        return {}
    if quantization.get("quant_method") != "vila-triton":
        raise ConfigError(f"{source}: quantization {short_repr(quantization.get('quant_method'))} is not supported")
    settings = read_dataclass(QuantizationSettings, quantization, f"{source} quantization_config")
    if not settings.group_size:
        raise ConfigError(f"{source} quantization_config: group_size is 0, expected inputs, or -1 for all of them")
    if settings.order not in roundings:
        names = " or ".join(map(repr, roundings))
        raise ConfigError(f"{source} quantization_config: order is {settings.order!r}, expected {names}")
    dense_linears = tuple(settings.modules_to_not_convert or ())
    return {"group_size": settings.group_size, "rounding": settings.order, "dense_linears": dense_linears}
