"""The fields of a config.json, read strictly into a dataclass."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A config.json says something this code does not know how to honour."""


def read(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from the entries of `values` that it declares; null counts as absent. Errors: `ConfigError`."""
    known = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}  # pyright: ignore
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]  # pyright: ignore
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    for f in fields(cls):  # pyright: ignore
        value, whole = known.get(f.name), f.type in (int, int | None)
        if f.type is bool and not isinstance(value, bool | None):
            raise ConfigError(f"{where}: {f.name} is {value!r}, expected true or false")
        if value is None or not (whole or f.type is float):
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ConfigError(f"{where}: {f.name} is {value!r}, expected a {'whole ' if whole else ''}number")
        if whole and value < 1 and f.name != "select_layer":
            raise ConfigError(f"{where}: {f.name} is {value}, expected at least 1")
    return cls(**known)
