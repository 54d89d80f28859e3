"""Repro bundles: one call of an implementation with its arguments in a file, to be run again on a changed kernel.

A bundle holds tensors, numbers and text in tuples, lists and dictionaries, and is read with `weights_only=True`: a file
from somebody else can be wrong, but it cannot run code.
"""

import inspect
import pickle
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.files.reading import require_file, short_repr
from vila_triton.ops import Int4, PagedKV, QuantizedKVPages, RaggedBatch
from vila_triton.registry import OPS, Impl, Op, describe_available, discover

from ..measure.rows import stamp
from .error_budget import DEVICE
from .guarded_memory import MEMORY_LAYOUTS, MemoryLayout, map_tensors

FORMAT = "vila-triton bundle 4"
FIELDS = {
    "op": str, "impl": str, "config": dict, "args": tuple, "seed": int, "layout": str, "sizes": dict, "origin": str,
    "target": str, "stamp": dict,
}  # fmt: skip


class BundleError(ValueError):
    """A file is not a bundle, or of an op or implementation that does not exist; the message is one line."""


@dataclass(frozen=True)
class Bundle:
    """A call.

    file     the file it was read from
    seed     of the memory that holds the arguments in a check, and of the values drawn
    layout   the memory layout of the arguments
    sizes    the sizes that the arguments were drawn for; empty if they come from a model
    origin   a description of where the call comes from
    target   the GPU that its kernels were compiled for, as sm_80; empty if they were not emulated
    stamp    versions and commit that it was saved under (`rows.stamp`)
    """

    file: Path
    op: str
    impl: str
    config: Mapping[str, Any]
    args: tuple
    seed: int
    layout: MemoryLayout
    sizes: Mapping[str, Any]
    origin: str
    target: str
    stamp: Mapping[str, str]


def unused_path(file: Path) -> Path:
    """The path itself, or if it exists, the first unused one of swiglu-mine-0-2.bundle, swiglu-mine-0-3.bundle, ...

    An empty file is created there, so that no other process takes the name.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for candidate in chain([file], (file.with_stem(f"{file.stem}-{i}") for i in count(2))):
        with suppress(FileExistsError):
            candidate.touch(exist_ok=False)
            return candidate
    raise AssertionError


def save(
    file: Path,
    impl: Impl,
    config: Mapping[str, Any],
    args: tuple,
    seed: int,
    layout: MemoryLayout,
    sizes: Mapping[str, Any],
    origin: str,
    target: str = "",
) -> None:
    """Write a bundle; tensors are stored dense, on the CPU, whatever memory they are views of."""
    dense = map_tensors(lambda x: x.detach().cpu().clone(memory_format=torch.contiguous_format), args)
    versions = {name: str(value) for name, value in stamp(torch.device(DEVICE)).items()}  # torch's is no plain str
    values = (impl.op, impl.name, dict(config), to_plain(dense), seed, layout, dict(sizes), origin, target, versions)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"format": FORMAT, **dict(zip(FIELDS, values))}, file)


LEAF_TYPES = (Int4, QuantizedKVPages, PagedKV, RaggedBatch)


def to_plain(value: Any) -> Any:
    """The tree with its dataclasses as dictionaries, which their keys tell apart."""
    if isinstance(value, LEAF_TYPES):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    return type(value)(map(to_plain, value)) if isinstance(value, tuple | list) else value


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`, on the device that is checked. Errors: BundleError for values that no op takes."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise BundleError(f"an argument is a {value.layout} tensor on {value.device}, expected a plain one")
        return value.to(DEVICE)
    if isinstance(value, dict):
        leaf_type = next((leaf for leaf in LEAF_TYPES if {field.name for field in fields(leaf)} == set(value)), None)
        if leaf_type is None:
            expected = "an int4 weight, quantized pages, a PagedKV or a RaggedBatch"
            raise BundleError(f"an argument is a dictionary of {sorted(map(str, value))}, expected {expected}")
        return leaf_type(**{name: from_plain(x) for name, x in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(map(from_plain, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise BundleError(f"an argument is a {type(value).__name__}, expected a tensor, an int4 weight or a number")


def load(file: Path) -> Bundle:
    """Read a bundle. Errors: BundleError, OSError, LoadError if there is no such file."""
    require_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise BundleError(f"{file} is no bundle: it is not tensors, numbers and text alone") from None
    except Exception as error:  # whatever torch's reader may raise for bytes that are not its own
        raise BundleError(f"{file} is no bundle, or not a whole one ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"{file} is no bundle: it does not begin with the format {FORMAT!r}")
    invalid = [name for name, field_type in FIELDS.items() if type(content.get(name)) is not field_type]
    if invalid or not 0 <= content["seed"] < 2**63:
        raise BundleError(f"{file} is no bundle: {', '.join(invalid) or 'seed'} missing or of the wrong type")
    if content["layout"] not in MEMORY_LAYOUTS:
        raise BundleError(
            f"{file} is no bundle: its layout is {content['layout']!r}, expected {' or '.join(MEMORY_LAYOUTS)}"
        )
    values = {name: content[name] for name in FIELDS}
    try:
        return Bundle(file, **{**values, "args": from_plain(values["args"])})
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from None


def resolve(bundle: Bundle) -> tuple[Op, Impl]:
    """The op and the implementation, as they are now. Errors: BundleError if they no longer take this call."""
    discover()
    if bundle.op not in OPS:
        available = describe_available(OPS)
        raise BundleError(
            f"{bundle.file} is of an op {short_repr(bundle.op)}, which does not exist; there are: {available}"
        )
    op = OPS[bundle.op]
    if bundle.impl not in op.impls:
        name, available = short_repr(bundle.impl), describe_available(op.impls)
        raise BundleError(f"{bundle.file} is of {op.name} {name}, which does not exist; there are: {available}")
    impl = op.impls[bundle.impl]
    try:
        inspect.signature(impl.fn).bind(*bundle.args, **bundle.config)
    except TypeError as error:
        raise BundleError(f"{bundle.file}: {op.name} {impl.name} no longer takes this call: {error}") from None
    try:
        op.check(*map_tensors(Tensor.cpu, bundle.args))  # where the values of indices are always checked
        op.reference(*map_tensors(torch.clone, bundle.args))
    except Exception as error:  # whatever a reference may raise for arguments that nobody checked
        raise BundleError(
            f"{bundle.file}: the reference of {op.name} does not take these arguments: {first_line(error)}"
        ) from None
    return op, impl


def first_line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
