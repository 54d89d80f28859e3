"""Tuned tables: configs/tuned/DEVICE.json, written by `python -m bench.tune` and looked up here. Nothing is tuned while
serving, and nothing is guessed: a call runs what the table says, and without a table `configs[0]`.

    {"device": ..., "entries": [{"op": ..., "impl": ..., "kernel": ..., "space": ..., "triton": ...,
      "ranges": [{"sizes": {"m": [0, 2], "n": 4096}, "config": {...}, "seconds": ...}, ...],
      "otherwise": {"config": {...}, ...}}]}

The sizes of a range are numbers, or [first, last] of those that vary from call to call (last null: no end). Sizes in no
range get `otherwise`: the config whose worst ratio to the best, over all sizes that were tuned, was least.

An entry holds for the very source and search space it was tuned with. When they have changed, a call that passes no
config raises `Stale`; when Triton has, the entry is left aside with a warning.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .choices import configs
from .registry import Impl
from .space import Config, canonical, digest


class Stale(RuntimeError):
    """A tuned table was made for a kernel that has changed since."""


def folder() -> Path:
    return configs() / "tuned"


def file_of(device: str, where: Path) -> Path:
    """The table of a device: its name in lower case, with - for what is neither letter nor digit."""
    return where / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def kernel_digest(impl: Impl) -> str:
    """Of the file of an implementation and of the files _*.py beside it, which it may use."""
    return digest(*(file.read_bytes() for file in [impl.file, *sorted(impl.file.parent.glob("_*.py"))]))


def space_digest(impl: Impl) -> str:
    """Of the configs and the axes; the functions of a space are in its kernel's file."""
    axes = {name: list(values) for name, values in impl.space.axes.items()} if impl.space else {}
    return digest(canonical([[dict(c) for c in impl.configs], axes]).encode())


def identity(impl: Impl) -> dict[str, str]:
    """What an entry must have been tuned with to hold now."""
    return {"kernel": kernel_digest(impl), "space": space_digest(impl), "triton": metadata.version("triton")}


def changes(entry: Mapping[str, Any], impl: Impl) -> dict[str, str]:
    """What differs from when the entry was made, and how; empty if it holds."""
    return {
        name: f"{name} was {entry.get(name)}, is {now}"
        for name, now in identity(impl).items()
        if entry.get(name) != now
    }


def read(file: Path) -> dict[str, Any]:
    """A table. Errors: ValueError naming the file if it is none."""
    try:
        table = json.loads(file.read_text())
        return {"device": table["device"], "entries": list(table["entries"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a tuned table: {error!r}") from None


def matches(wanted: Mapping[str, Any], sizes: Mapping[str, Any]) -> bool:
    for name, want in wanted.items():
        size = sizes.get(name)
        if isinstance(want, list):
            first, last = want
            if not isinstance(size, int) or size < first or (last is not None and size > last):
                return False
        elif size != want:
            return False
    return True


def pick(entry: Mapping[str, Any], sizes: Mapping[str, Any]) -> Config:
    """The config of the range these sizes lie in, else the one written for all others."""
    return next((r["config"] for r in entry["ranges"] if matches(r["sizes"], sizes)), entry["otherwise"]["config"])


@lru_cache
def entry_of(impl: Impl, device: str) -> Mapping[str, Any] | None:
    """The entry of an implementation in the table of a device, checked once. Errors: `Stale`."""
    file = file_of(device, folder())
    table = read(file) if file.exists() else {"device": device, "entries": []}
    if table["device"] != device:
        raise Stale(f"the tuned table {file.name} was made on {table['device']}, this is {device}")
    entry = next((e for e in table["entries"] if (e["op"], e["impl"]) == (impl.op, impl.name)), None)
    changed = changes(entry, impl) if entry else {}
    if changed.keys() - {"triton"}:
        raise Stale(
            f"{impl.op} {impl.name}: the tuned table {file.name} is stale: {'; '.join(changed.values())}. "
            f"Run `python -m bench.tune {impl.op} --impl {impl.name}`, pass a config, or delete the entry."
        )
    if changed:
        warnings.warn(f"{impl.op} {impl.name}: {file.name} is left aside: {changed['triton']}", stacklevel=2)
        return None
    return entry


@lru_cache(maxsize=4096)
def config_at(impl: Impl, device: str, sizes: tuple[tuple[str, Any], ...]) -> Config | None:
    entry = entry_of(impl, device)
    return pick(entry, dict(sizes)) if entry else None


@lru_cache
def name_of(device: torch.device) -> str | None:
    """The device whose table holds; on a CPU there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def config(impl: Impl, sizes_of: Callable[..., dict[str, Any]] | None, *args: Any, **kwargs: Any) -> Config | None:
    """The config tuned for this call on the device of its first tensor; None if nothing was tuned for it."""
    device = next((name_of(x.device) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if device is None or sizes_of is None:
        return None
    return config_at(impl, device, tuple(sizes_of(*args, **kwargs).items()))
