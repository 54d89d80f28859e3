"""Tuned tables: configs/tuned/DEVICE.json, written by `python -m bench.tune` and looked up here. Nothing is tuned while
serving, and nothing is guessed: a call runs what the table says, and without a table `configs[0]`.

    {"device": ..., "choices": {"int4_matmul": {"first": 1, "last": 4096, "choice": [[4, "gemv"], "prefill"]}, ...},
     "entries": [{"op": ..., "impl": ..., "kernel": ..., "space": ..., "triton": ...,
       "ranges": [{"sizes": {"m": [0, 2], "n": 4096}, "tuned_at": {"m": 1}, "config": {...}, "seconds": ...}, ...],
       "otherwise": {"config": {...}, ...}}]}

The sizes of a range are numbers, or [first, last] of those that vary from call to call (last null: no end). Sizes in no
range get `otherwise`: the config whose worst ratio to the best, over all sizes that were tuned, was least.

A choice (see `ranges`) stands where several implementations of an op were tuned; on that device it holds in place of
what configs/kernels.toml says, from the first to the last size at which they were compared.

An entry holds for the very source and search space it was tuned with, a choice as long as the entries of all it names.
When they have changed, a call that passes no config raises `Stale`, and so does a step that would go by the choice;
when Triton has, the entry or the choice is left aside with a warning.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.json_schema import is_a, require_form
from ..files.reading import LoadError, read_json, shown
from ..paths import config_dir
from .kernel_config import configured
from .op import OPS, REFERENCE, Impl
from .registry import checked, explicit
from .search_space import Config, canonical, digest
from .size_ranges import Choice, Within, names


class Stale(RuntimeError):
    """A tuned table was made for a kernel that has changed since."""


def folder() -> Path:
    return config_dir() / "tuned"


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


NUMBERS = {
    "ranges": [{"sizes": dict, "tuned_at": dict, "config": dict, "seconds": float}],
    "otherwise": {"config": dict},
}
ENTRY = {**dict.fromkeys(("op", "impl", "kernel", "space", "triton"), str), **NUMBERS}


def read(file: Path) -> dict[str, Any]:
    """A table. Errors: `LoadError` naming the file and the field if it is none."""
    table = {"choices": {}, **read_json(file)}
    require_form(table, {"device": str, "choices": dict, "entries": [ENTRY]}, file)
    for i, entry in enumerate(table["entries"]):
        for j, ran in enumerate(entry["ranges"]):
            require_range(ran, entry["op"], f"{file}, entries {i}, ranges {j}")
    return {name: table[name] for name in ("device", "choices", "entries")}


def require_range(of: Mapping[str, Any], op: str, where: str) -> None:
    """Errors: `LoadError` for sizes that cannot be looked up, and for a time that is none."""
    for name, size in of["sizes"].items():
        ends = isinstance(size, list) and len(size) == 2 and is_a(size[0], int) and isinstance(size[1], int | None)
        if not ends and not isinstance(size, str | int | float | None):
            raise LoadError(f"{where}, sizes, {name} is {shown(size)}, expected a size or [first, last]")
    for name in OPS[op].varying if op in OPS else ():
        require_form(of["tuned_at"], {name: int}, f"{where}, tuned_at")
        if of["tuned_at"][name] < 0:
            raise LoadError(f"{where}, tuned_at, {name} is {of['tuned_at'][name]}, expected a size from 0 up")
    if of["seconds"] <= 0:
        raise LoadError(f"{where}, seconds is {of['seconds']}, expected a time above 0")


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
def table_of(device: str) -> Mapping[str, Any]:
    """The table of a device, empty if there is none. Errors: `Stale` if it was made on another."""
    file = file_of(device, folder())
    table = read(file) if file.exists() else {"device": device, "choices": {}, "entries": []}
    if table["device"] != device:
        raise Stale(f"the tuned table {file.name} was made on {table['device']}, this is {device}")
    return table


@lru_cache
def entry_of(impl: Impl, device: str) -> Mapping[str, Any] | None:
    """The entry of an implementation in the table of a device, checked once. Errors: `Stale`."""
    file = file_of(device, folder())
    entry = next((e for e in table_of(device)["entries"] if (e["op"], e["impl"]) == (impl.op, impl.name)), None)
    changed = changes(entry, impl) if entry else {}
    if changed.keys() - {"triton"}:
        raise Stale(
            f"{impl.op} {impl.name}: the tuned table {file.name} is stale: {'; '.join(changed.values())}. "
            f"Run `python -m bench.tune {impl.op} --impl {impl.name}`, pass a config, or delete the entry."
        )
    if changed:
        warnings.warn(f"{impl.op} {impl.name}: {file.name} is left aside: {changed['triton']}", stacklevel=2)
        return None
    for config in (*(ran["config"] for ran in entry["ranges"]), entry["otherwise"]["config"]) if entry else ():
        if not offered(config, impl):
            raise ValueError(f"{file}: {impl.op} {impl.name} has no config {shown(config)}, in its file or its space")
    return entry


def offered(config: Config, impl: Impl) -> bool:
    """Whether an implementation has a config, in its file or its space."""
    axes = impl.space.axes if impl.space else {}
    in_space = config.keys() == axes.keys() and all(value in axes[name] for name, value in config.items())
    return in_space or config in [dict(own) for own in impl.configs]


def parsed(table: Mapping[str, Any], op: str, file: Path) -> Within:
    """The choice a table holds for an op. Errors: ValueError naming the file; `Stale` if what it names has no entry."""
    value = table["choices"][op]
    try:
        if not isinstance(value, dict) or [type(value.get(key)) for key in ("first", "last")] != [int, int]:
            raise ValueError(
                f'op {op!r}: {value!r} is no choice, expected {{"first": size, "last": size, "choice": ...}}'
            )
        if not 0 <= value["first"] <= value["last"]:
            raise ValueError(f"op {op!r}: from {value['first']} to {value['last']} are no sizes")
        within = Within(value["first"], value["last"], checked({op: value.get("choice")})[op])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}, choices: {error.args[0]}") from None
    entries = {e["impl"] for e in table["entries"] if e["op"] == op}
    if missing := [name for name in names(within.choice) if name not in entries]:
        raise Stale(
            f"{op}: the tuned table {file.name} chooses {missing[0]}, which has no entry in it. "
            f"Run `python -m bench.tune {op} --impl {missing[0]}`, choose explicitly, or delete the choice."
        )
    return within


@lru_cache
def choice_of(op: str, device: str) -> Within | None:
    """The choice the table of a device holds for an op, checked once; None if it is left aside. Errors: as `parsed`,
    and `Stale` if an entry of what it names is.
    """
    within = parsed(table_of(device), op, file_of(device, folder()))
    entries = [entry_of(OPS[op].impls[name], device) for name in names(within.choice)]
    return None if None in entries else within


def kernels_for(device: torch.device, phase: str | None, only: str | None = None) -> Mapping[str, Choice]:
    """What runs by default: as configs/kernels.toml says, but for the ops and sizes that the table of this very device
    chooses for. What `use` chooses is not looked up, so a table gone stale does not stand in its way; nor is any of
    them under the policy "invariant", which is a phase here: what is fastest depends on the size. `only`: of one op.
    """
    choices, name = configured(device.type, phase, only), name_of(device) if phase != "invariant" else None
    ops = table_of(name)["choices"].keys() - explicit().keys() if name else ()
    tuned = {op: within for op in ops if only in (None, op) and (within := choice_of(op, name or ""))}
    return {**choices, **{op: within.over(choices.get(op, REFERENCE)) for op, within in tuned.items()}}


def usual(op: str, policy: str, *args: Any, **kwargs: Any) -> Choice:
    """What a call outside an engine runs. It is of no phase, so what one of them alone is given in kernels.toml is not
    for it; without a tensor it runs the reference.
    """
    device = device_of(*args, **kwargs)
    if device is None:
        return REFERENCE
    return kernels_for(device, "invariant" if policy == "invariant" else None, op).get(op, REFERENCE)


def device_of(*args: Any, **kwargs: Any) -> torch.device | None:
    """The device of a call: that of its first tensor."""
    return next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


@lru_cache(maxsize=4096)
def config_at(impl: Impl, device: str, sizes: tuple[tuple[str, Any], ...]) -> Config | None:
    entry = entry_of(impl, device)
    return pick(entry, dict(sizes)) if entry else None


@lru_cache
def name_of(device: torch.device) -> str | None:
    """The device whose table holds; of a CPU, and of a GPU that is not here, there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else None


def config(impl: Impl, sizes_of: Callable[..., dict[str, Any]] | None, *args: Any, **kwargs: Any) -> Config | None:
    """The config tuned for this call on the device of its first tensor; None if nothing was tuned for it."""
    device = device_of(*args, **kwargs)
    if device is None or sizes_of is None or (name := name_of(device)) is None:
        return None
    return config_at(impl, name, tuple(sizes_of(*args, **kwargs).items()))
