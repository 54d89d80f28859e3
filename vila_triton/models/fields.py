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


def int4_fields(values: Mapping[str, Any], where: str, orders: tuple[str, ...] = ("sub",)) -> dict[str, Any]:
    """`group_size` and `order` of a part whose `quantization_config` says that its linears are int4, else nothing.

    Errors: `ConfigError`.
    """
    said = values.get("quantization_config")
    if not said:
        return {}
    if said.get("quant_method") != "vila-triton":
        raise ConfigError(f"{where}: quantization {said.get('quant_method')!r} is not supported")
    if not said.get("group_size"):
        raise ConfigError(f"{where} quantization_config: missing group_size")
    order = said.get("order") or "sub"
    if order not in orders:
        names = " or ".join(map(repr, orders))
        raise ConfigError(f"{where} quantization_config: order is {order!r}, expected {names}")
    return {"group_size": said["group_size"], "order": order}
