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

from ..files.json_schema import is_json_type, require_schema
from ..files.reading import LoadError, read_json, short_repr
from ..paths import config_dir
from .kernel_config import configured_choices
from .op import OPS, REFERENCE, Impl
from .registry import explicit_choices, validate_choices
from .search_space import Config, canonical_json, short_hash
from .size_ranges import BoundedChoice, Choice, implementation_names


class StaleTableError(RuntimeError):
    """A tuned table was made for a kernel that has changed since."""


def tables_dir() -> Path:
    return config_dir() / "tuned"


def table_path(device: str, directory: Path) -> Path:
    """The table of a device: its name in lower case, with - for what is neither letter nor digit."""
    return directory / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def kernel_hash(impl: Impl) -> str:
    """Of the file of an implementation and of the files _*.py beside it, which it may use."""
    return short_hash(*(file.read_bytes() for file in [impl.file, *sorted(impl.file.parent.glob("_*.py"))]))


def space_hash(impl: Impl) -> str:
    """Of the configs and the axes; the functions of a space are in its kernel's file."""
    axes = {name: list(values) for name, values in impl.space.axes.items()} if impl.space else {}
    return short_hash(canonical_json([[dict(c) for c in impl.configs], axes]).encode())


def entry_fingerprint(impl: Impl) -> dict[str, str]:
    """What an entry must have been tuned with to hold now."""
    return {"kernel": kernel_hash(impl), "space": space_hash(impl), "triton": metadata.version("triton")}


def stale_reasons(entry: Mapping[str, Any], impl: Impl) -> dict[str, str]:
    """What differs from when the entry was made, and how; empty if it holds."""
    return {
        name: f"{name} was {entry.get(name)}, is {current}"
        for name, current in entry_fingerprint(impl).items()
        if entry.get(name) != current
    }


MEASURED_FIELDS = {
    "ranges": [{"sizes": dict, "tuned_at": dict, "config": dict, "seconds": float}],
    "otherwise": {"config": dict},
}
ENTRY_FIELDS = {**dict.fromkeys(("op", "impl", "kernel", "space", "triton"), str), **MEASURED_FIELDS}


def read_table(file: Path) -> dict[str, Any]:
    """A table. Errors: `LoadError` naming the file and the field if it is none."""
    table = {"choices": {}, **read_json(file)}
    require_schema(table, {"device": str, "choices": dict, "entries": [ENTRY_FIELDS]}, file)
    for i, entry in enumerate(table["entries"]):
        for j, tuned_range in enumerate(entry["ranges"]):
            check_range(tuned_range, entry["op"], f"{file}, entries {i}, ranges {j}")
    return {name: table[name] for name in ("device", "choices", "entries")}


def check_range(tuned_range: Mapping[str, Any], op: str, where: str) -> None:
    """Errors: `LoadError` for sizes that cannot be looked up, and for a time that is none."""
    for name, size in tuned_range["sizes"].items():
        is_interval = (
            isinstance(size, list) and len(size) == 2 and is_json_type(size[0], int) and isinstance(size[1], int | None)
        )
        if not is_interval and not isinstance(size, str | int | float | None):
            raise LoadError(f"{where}, sizes, {name} is {short_repr(size)}, expected a size or [first, last]")
    for name in OPS[op].dynamic_sizes if op in OPS else ():
        require_schema(tuned_range["tuned_at"], {name: int}, f"{where}, tuned_at")
        if tuned_range["tuned_at"][name] < 0:
            raise LoadError(f"{where}, tuned_at, {name} is {tuned_range['tuned_at'][name]}, expected a size from 0 up")
    if tuned_range["seconds"] <= 0:
        raise LoadError(f"{where}, seconds is {tuned_range['seconds']}, expected a time above 0")


def sizes_match(expected_sizes: Mapping[str, Any], sizes: Mapping[str, Any]) -> bool:
    for name, expected in expected_sizes.items():
        size = sizes.get(name)
        if isinstance(expected, list):
            first, last = expected
            if not isinstance(size, int) or size < first or (last is not None and size > last):
                return False
        elif size != expected:
            return False
    return True


def config_for_sizes(entry: Mapping[str, Any], sizes: Mapping[str, Any]) -> Config:
    """The config of the range these sizes lie in, else the one written for all others."""
    return next((r["config"] for r in entry["ranges"] if sizes_match(r["sizes"], sizes)), entry["otherwise"]["config"])


@lru_cache
def load_table(device: str) -> Mapping[str, Any]:
    """The table of a device, empty if there is none. Errors: `Stale` if it was made on another."""
    file = table_path(device, tables_dir())
    table = read_table(file) if file.exists() else {"device": device, "choices": {}, "entries": []}
    if table["device"] != device:
        raise StaleTableError(f"the tuned table {file.name} was made on {table['device']}, this is {device}")
    return table


@lru_cache
def valid_entry(impl: Impl, device: str) -> Mapping[str, Any] | None:
    """The entry of an implementation in the table of a device, checked once. Errors: `Stale`."""
    file = table_path(device, tables_dir())
    entry = next((e for e in load_table(device)["entries"] if (e["op"], e["impl"]) == (impl.op, impl.name)), None)
    changed = stale_reasons(entry, impl) if entry else {}
    if changed.keys() - {"triton"}:
        raise StaleTableError(
            f"{impl.op} {impl.name}: the tuned table {file.name} is stale: {'; '.join(changed.values())}. "
            f"Run `python -m bench.tune {impl.op} --impl {impl.name}`, pass a config, or delete the entry."
        )
    if changed:
        warnings.warn(f"{impl.op} {impl.name}: {file.name} is left aside: {changed['triton']}", stacklevel=2)
        return None
    for config in (
        (*(tuned_range["config"] for tuned_range in entry["ranges"]), entry["otherwise"]["config"]) if entry else ()
    ):
        if not has_config(config, impl):
            raise ValueError(
                f"{file}: {impl.op} {impl.name} has no config {short_repr(config)}, in its file or its space"
            )
    return entry


def has_config(config: Config, impl: Impl) -> bool:
    """Whether an implementation has a config, in its file or its space."""
    axes = impl.space.axes if impl.space else {}
    in_space = config.keys() == axes.keys() and all(value in axes[name] for name, value in config.items())
    return in_space or config in [dict(own) for own in impl.configs]


def parse_table_choice(table: Mapping[str, Any], op: str, file: Path) -> BoundedChoice:
    """The choice a table holds for an op. Errors: ValueError naming the file; `Stale` if what it names has no entry."""
    value = table["choices"][op]
    try:
        if not isinstance(value, dict) or [type(value.get(key)) for key in ("first", "last")] != [int, int]:
            raise ValueError(
                f'op {op!r}: {value!r} is no choice, expected {{"first": size, "last": size, "choice": ...}}'
            )
        if not 0 <= value["first"] <= value["last"]:
            raise ValueError(f"op {op!r}: from {value['first']} to {value['last']} are no sizes")
        within = BoundedChoice(value["first"], value["last"], validate_choices({op: value.get("choice")})[op])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}, choices: {error.args[0]}") from None
    entries = {e["impl"] for e in table["entries"] if e["op"] == op}
    if missing := [name for name in implementation_names(within.choice) if name not in entries]:
        raise StaleTableError(
            f"{op}: the tuned table {file.name} chooses {missing[0]}, which has no entry in it. "
            f"Run `python -m bench.tune {op} --impl {missing[0]}`, choose explicitly, or delete the choice."
        )
    return within


@lru_cache
def table_choice(op: str, device: str) -> BoundedChoice | None:
    """The choice the table of a device holds for an op, checked once; None if it is left aside. Errors: as `parsed`,
    and `Stale` if an entry of what it names is.
    """
    within = parse_table_choice(load_table(device), op, table_path(device, tables_dir()))
    entries = [valid_entry(OPS[op].impls[name], device) for name in implementation_names(within.choice)]
    return None if None in entries else within


def default_choices_for(device: torch.device, phase: str | None, op_name: str | None = None) -> Mapping[str, Choice]:
    """What runs by default: as configs/kernels.toml says, but for the ops and sizes that the table of this very device
    chooses for. What `use` chooses is not looked up, so a table gone stale does not stand in its way; nor is any of
    them under the policy "invariant", which is a phase here: what is fastest depends on the size. `only`: of one op.
    """
    choices, gpu = configured_choices(device.type, phase, op_name), gpu_name(device) if phase != "invariant" else None
    ops = load_table(gpu)["choices"].keys() - explicit_choices().keys() if gpu else ()
    tuned = {op: within for op in ops if op_name in (None, op) and (within := table_choice(op, gpu or ""))}
    return {**choices, **{op: within.with_fallback(choices.get(op, REFERENCE)) for op, within in tuned.items()}}


def default_choice(op: str, numerics: str, *args: Any, **kwargs: Any) -> Choice:
    """What a call outside an engine runs. It is of no phase, so what one of them alone is given in kernels.toml is not
    for it; without a tensor it runs the reference.
    """
    device = device_of(*args, **kwargs)
    if device is None:
        return REFERENCE
    return default_choices_for(device, "invariant" if numerics == "invariant" else None, op).get(op, REFERENCE)


def device_of(*args: Any, **kwargs: Any) -> torch.device | None:
    """The device of a call: that of its first tensor."""
    return next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


@lru_cache(maxsize=4096)
def tuned_config_at(impl: Impl, device: str, sizes: tuple[tuple[str, Any], ...]) -> Config | None:
    entry = valid_entry(impl, device)
    return config_for_sizes(entry, dict(sizes)) if entry else None


@lru_cache
def gpu_name(device: torch.device) -> str | None:
    """The device whose table holds; of a CPU, and of a GPU that is not here, there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else None


def tuned_config(
    impl: Impl, sizes_of: Callable[..., dict[str, Any]] | None, *args: Any, **kwargs: Any
) -> Config | None:
    """The config tuned for this call on the device of its first tensor; None if nothing was tuned for it."""
    device = device_of(*args, **kwargs)
    if device is None or sizes_of is None or (gpu := gpu_name(device)) is None:
        return None
    return tuned_config_at(impl, gpu, tuple(sizes_of(*args, **kwargs).items()))
