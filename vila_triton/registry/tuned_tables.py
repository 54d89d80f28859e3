"""Tuned tables: configs/tuned/DEVICE.json is written by `python -m bench.tune` and looked up here.

Nothing is tuned while serving: a call runs the config that the table holds for its sizes, else `configs[0]`.

    {"device": ..., "choices": {"int4_matmul": {"first": 1, "last": 4096, "choice": [[4, "gemv"], "prefill"]}, ...},
     "entries": [{"op": ..., "impl": ..., "kernel": ..., "space": ..., "triton": ...,
       "source": {"distribution": "", "file": "mine.py"},
       "ranges": [{"sizes": {"m": [0, 2], "n": 4096}, "tuned_at": {"m": 1}, "config": {...}, "seconds": ...}, ...],
       "otherwise": {"config": {...}, ...}}]}

The sizes of a range are numbers, and [first, last] for the op's dynamic sizes (last null: no end). Sizes in no range
get `otherwise`: the config whose worst slowdown against the best, over all sizes that were tuned, was least.

A choice (see `size_ranges`) is written where several implementations of an op were tuned. On that device it replaces
the choice of configs/kernels.toml, from the first to the last size at which they were compared.

An entry is valid for the source and the search space it was tuned with, and a choice while the entries of all its
implementations are. When these have changed, a call that passes no config raises `StaleTableError`, and so does a step
that the choice decides. When Triton has changed, the entry or the choice is ignored with a warning.

The source says where an implementation came from (see `sources`). A step that is decided by a choice of one that this
process does not know raises `KernelNotLoadedError`, which names it; a choice of an op that it does not know is a
warning.
"""

import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.json_schema import is_json_type, require_schema
from ..files.reading import LoadError, read_json, short_repr
from ..hashing import canonical_json, short_hash
from ..paths import config_dir, data_dir
from .discovery import discover, validate_choices
from .kernel_config import configured_choices
from .op import OPS, REFERENCE, Impl, Op
from .policy import EXPLICIT_CHOICES
from .search_space import Config
from .size_ranges import BoundedChoice, Choice, ChoiceByCase, implementation_names, parse_choice
from .sources import describe_missing


class StaleTableError(RuntimeError):
    """A tuned table was measured for a kernel that has changed since."""


class KernelNotLoadedError(StaleTableError):
    """A tuned table chooses a kernel of a file or a distribution that this process does not know."""


def tables_dir() -> Path:
    """Return the folder of the tuned tables, which exists once a device has been tuned."""
    return config_dir() / "tuned"


def table_path(device: str, directory: Path) -> Path:
    """The file of a device: its name in lower case, with a dash for characters that are neither letters nor digits."""
    return directory / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def kernel_hash(impl: Impl) -> str:
    """The hash of the file of an implementation and of the files _*.py that it may import, its own and of kernels/."""
    folders = dict.fromkeys((impl.file.parent, data_dir("kernels")))
    helpers = [file for folder in folders for file in sorted(folder.glob("_*.py"))]
    return short_hash(*(file.read_bytes() for file in [impl.file, *helpers]))


def space_hash(impl: Impl) -> str:
    """The hash of the configs and the axes; the functions of a space are covered by `kernel_hash`."""
    axes = {name: list(values) for name, values in impl.space.axes.items()} if impl.space else {}
    return short_hash(canonical_json([[dict(c) for c in impl.configs], axes]).encode())


def entry_fingerprint(impl: Impl) -> dict[str, str]:
    """The hashes and the version that an entry must have been tuned with to be valid."""
    return {"kernel": kernel_hash(impl), "space": space_hash(impl), "triton": metadata.version("triton")}


def stale_reasons(entry: Mapping[str, Any], impl: Impl) -> dict[str, str]:
    """By key of `entry_fingerprint`, the values of then and now that differ; empty if the entry is valid."""
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
    """Read a table. Raises `LoadError` naming the file and the field that is wrong."""
    table = {"choices": {}, **read_json(file)}
    require_schema(table, {"device": str, "choices": dict, "entries": [ENTRY_FIELDS]}, file)
    for i, entry in enumerate(table["entries"]):
        if "source" in entry:
            require_schema(entry["source"], {"distribution": str, "file": str}, f"{file}, entries {i}, source")
        for j, tuned_range in enumerate(entry["ranges"]):
            check_range(tuned_range, entry["op"], f"{file}, entries {i}, ranges {j}")
    return {name: table[name] for name in ("device", "choices", "entries")}


def check_range(tuned_range: Mapping[str, Any], op: str, where: str) -> None:
    """Raise `LoadError` for sizes that cannot be looked up, and for a time that is not positive."""
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
    """Return True if each expected size is met: equal, or in a range [first, last] where None means no end. A choice of
    yes or no, as a bias or a residual, is met by either: the best config hardly depends on it.
    """
    for name, expected in expected_sizes.items():
        size = sizes.get(name)
        if isinstance(expected, bool):
            continue
        if isinstance(expected, list):
            first, last = expected
            if not isinstance(size, int) or size < first or (last is not None and size > last):
                return False
        elif size != expected:
            return False
    return True


def config_for_sizes(entry: Mapping[str, Any], sizes: Mapping[str, Any]) -> Config:
    """The config of the range that holds these sizes, else that of `otherwise`."""
    return next((r["config"] for r in entry["ranges"] if sizes_match(r["sizes"], sizes)), entry["otherwise"]["config"])


@lru_cache
def load_table(device: str) -> Mapping[str, Any]:
    """The table of a device, empty if it has none. Raises `StaleTableError` if it was measured on another device."""
    file = table_path(device, tables_dir())
    table = read_table(file) if file.exists() else {"device": device, "choices": {}, "entries": []}
    if table["device"] != device:
        raise StaleTableError(f"the tuned table {file.name} was made on {table['device']}, this is {device}")
    return table


@lru_cache
def valid_entry(impl: Impl, device: str) -> Mapping[str, Any] | None:
    """The entry of an implementation in the table of a device, checked once; None if there is none for this Triton.

    Raises `StaleTableError` if the kernel or its search space has changed, ValueError for a config that does not exist.
    """
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
    measured = [*entry["ranges"], entry["otherwise"]] if entry else []
    for config in (x["config"] for x in measured):
        if not has_config(config, impl):
            raise ValueError(
                f"{file}: {impl.op} {impl.name} has no config {short_repr(config)}, in its file or its space"
            )
    return entry


def has_config(config: Config, impl: Impl) -> bool:
    """True if a config is among those of an implementation or in its search space."""
    axes = impl.space.axes if impl.space else {}
    in_space = config.keys() == axes.keys() and all(value in axes[name] for name, value in config.items())
    return in_space or config in [dict(own) for own in impl.configs]


def parse_table_choice(table: Mapping[str, Any], op: str, file: Path) -> BoundedChoice:
    """The choice that a table holds for an op.

    Raises ValueError naming the file, `KernelNotLoadedError` if an implementation with an entry is not known here, and
    `StaleTableError` if one that it names has no entry.
    """
    value, missing = table["choices"][op], missing_kernels(table, op)
    try:
        if not isinstance(value, dict) or [type(value.get(key)) for key in ("first", "last")] != [int, int]:
            raise ValueError(
                f'op {op!r}: {value!r} is no choice, expected {{"first": size, "last": size, "choice": ...}}'
            )
        if not 0 <= value["first"] <= value["last"]:
            raise ValueError(f"op {op!r}: from {value['first']} to {value['last']} are no sizes")
        named = implementation_names(parse_choice(value.get("choice"))) if missing else ()
        if chosen := [name for name in named if name in missing]:
            raise KernelNotLoadedError(
                f"{op}: the tuned table {file.name} chooses {short_repr(chosen[0])} {missing[chosen[0]]}; "
                "or choose another explicitly, or delete the choice."
            )
        choice = validate_choices({op: value.get("choice")})[op]
        if isinstance(choice, ChoiceByCase):
            raise ValueError(f"op {op!r}: a tuned choice goes by ranges of a size, not by cases")
        bounded = BoundedChoice(value["first"], value["last"], choice)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}, choices: {error.args[0]}") from None
    entries = {e["impl"] for e in table["entries"] if e["op"] == op}
    if missing := [name for name in implementation_names(bounded.choice) if name not in entries]:
        raise StaleTableError(
            f"{op}: the tuned table {file.name} chooses {missing[0]}, which has no entry in it. "
            f"Run `python -m bench.tune {op} --impl {missing[0]}`, choose explicitly, or delete the choice."
        )
    return bounded


def missing_kernels(table: Mapping[str, Any], op: str) -> dict[str, str]:
    """The implementations of an op that have an entry with a source and are not known here -> where each came from, and
    what makes it known.
    """
    sources = {e["impl"]: e["source"] for e in table["entries"] if e["op"] == op and "source" in e}
    known = OPS[op].impls if op in OPS else {}
    if sources.keys() - known:
        discover()
        known = OPS[op].impls if op in OPS else {}
    return {name: describe_missing(source) for name, source in sources.items() if name not in known}


@lru_cache
def warn_of_unknown_op(op: str, device: str) -> None:
    """Warn, once, that the table of a device chooses implementations of an op that is not known here."""
    missing = missing_kernels(load_table(device), op)
    where = next(iter(missing.values()), "which does not exist")
    warnings.warn(f"{table_path(device, tables_dir()).name} is about an op {op!r} {where}", stacklevel=2)


@lru_cache
def table_choice(op: str, device: str) -> BoundedChoice | None:
    """The choice that the table of a device holds for an op, checked once; None if it is ignored.

    Raises what `parse_table_choice` and `valid_entry` raise.
    """
    bounded = parse_table_choice(load_table(device), op, table_path(device, tables_dir()))
    entries = [valid_entry(OPS[op].impls[name], device) for name in implementation_names(bounded.choice)]
    return None if None in entries else bounded


def default_choices_for(device: torch.device, phase: str | None, op_name: str | None = None) -> Mapping[str, Choice]:
    """The implementations that run by default: those of configs/kernels.toml, replaced by those of the device's table
    for the ops and sizes it was tuned at.

    phase: one of `kernel_config.PHASES`, or None for a call outside an engine: then only the device's own section
    holds. With batch-invariant numerics, which are a phase here, the table is not read, since the fastest
    implementation depends on the size. Neither are its entries for ops that `use` chooses for, so that a stale table
    can be worked around. op_name: of one op only.
    """
    choices, gpu = (
        configured_choices(device.type, phase, op_name),
        gpu_name(device) if phase != "batch_invariant" else None,
    )
    ops = load_table(gpu)["choices"].keys() - EXPLICIT_CHOICES.get().keys() if gpu else ()
    for unknown in (op for op in ops if op not in OPS and op_name is None):
        warn_of_unknown_op(unknown, gpu or "")
    ops = [op for op in ops if op in OPS and op_name in (None, op)]
    tuned = {op: choice for op in ops if (choice := table_choice(op, gpu or ""))}
    return {**choices, **{op: choice.with_fallback(choices.get(op, REFERENCE)) for op, choice in tuned.items()}}


def default_choice(op: Op, *args: Any, **kwargs: Any) -> Choice:
    """The choice for a call outside an engine: as an engine makes it for the device of the call.

    Such a call has no phase: of the phase sections only [device.batch_invariant] applies, and only if the call's
    `numerics` say so. A call without a tensor runs the reference.
    """
    device = device_of(*args, **kwargs)
    if device is None:
        return REFERENCE
    invariant = (
        "numerics" in op.domain and op.sizes_of and op.sizes_of(*args, **kwargs)["numerics"] == "batch_invariant"
    )
    return default_choices_for(device, "batch_invariant" if invariant else None, op.name).get(op.name, REFERENCE)


def device_of(*args: Any, **kwargs: Any) -> torch.device | None:
    """The device of the first tensor of a call."""
    return next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def table_of(*args: Any, **kwargs: Any) -> Mapping[str, Any] | None:
    """The tuned table of the device of a call, None without one."""
    device = args[0].device if args and isinstance(args[0], Tensor) else device_of(*args, **kwargs)
    gpu = gpu_name(device) if device is not None else None
    return load_table(gpu) if gpu else None


@lru_cache(maxsize=4096)
def tuned_config_at(impl: Impl, device: str, sizes: tuple[tuple[str, Any], ...]) -> Config | None:
    """Return the config that was tuned for a device and sizes, or None; the latest 4096 answers are cached."""
    entry = valid_entry(impl, device)
    return config_for_sizes(entry, dict(sizes)) if entry else None


@lru_cache
def gpu_name(device: torch.device) -> str | None:
    """The name that a table is looked up by; None for a CPU, and for a GPU that this machine does not have."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else None


def tuned_config(impl: Impl, *args: Any, **kwargs: Any) -> Config | None:
    """The config that was tuned for the device and sizes of a call; None if there is none."""
    device, sizes_of = device_of(*args, **kwargs), OPS[impl.op].sizes_of
    if device is None or sizes_of is None or (gpu := gpu_name(device)) is None:
        return None
    return tuned_config_at(impl, gpu, tuple(sizes_of(*args, **kwargs).items()))
