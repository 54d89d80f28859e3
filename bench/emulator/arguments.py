"""The arguments of a launch as a kernel's parameters, and the memory that they let it touch."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..correctness.guarded_memory import find_guard
from .memory.regions import Region


def flatten_arguments(
    kernel: str, values: Mapping[str, Any], signature: Mapping[str, Any]
) -> list[tuple[str, str, Any]]:
    """(name, type, value) of each parameter of the compiled kernel, in order: of a tuple one each, of constants none.

    signature: Triton's types by the names of arguments, as "*fp32", "i32", "constexpr", or a tuple of such.
    Errors: NotImplementedError for tensor descriptors.
    """
    flat: list[tuple[str, str, Any]] = []

    def add(name: str, kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            names = getattr(value, "_fields", range(len(kind)))
            for field, part_kind, part in zip(names, kind, value, strict=True):
                add(f"{name}[{field}]", part_kind, part)
        elif kind.startswith(("tensordesc", "nvTmaDesc")):
            raise NotImplementedError(f"{kernel}: argument {name} is a tensor descriptor, which is not emulated")
        elif kind != "constexpr":
            flat.append((name, kind, value))

    for name, kind in signature.items():
        add(name, kind, values[name])
    return flat


def parameter_bits(kernel: str, name: str, kind: str, value: Any) -> np.ndarray:
    """The bits of one parameter, as a driver would pass them. Errors: NotImplementedError."""
    if hasattr(value, "data_ptr"):
        return np.array([value.data_ptr()], np.uint64)
    if kind.startswith("*"):  # an address as a number
        return np.array([value or 0], np.uint64)
    if kind == "bf16":
        return torch.tensor([value], dtype=torch.bfloat16).view(torch.uint16).numpy()
    if kind in ("fp16", "fp32", "fp64"):
        return np.array([value], f"f{int(kind[2:]) // 8}").view(f"u{int(kind[2:]) // 8}")
    if kind[0] in "iu" and kind[1:].isdigit():
        bits = max(8, int(kind[1:]))
        return np.array([int(value) & (2**bits - 1)], f"u{bits // 8}")
    raise NotImplementedError(f"{kernel}: argument {name} of type {kind} is not emulated")


def memory_regions(kernel: str, arguments: Iterable[tuple[str, str, Any]]) -> list[Region]:
    """The memory that arguments let a kernel touch: of a tensor in guarded memory its own elements, of any other its
    whole storage, of which it may be a part. Storages that share bytes, as of two views of one numpy array, are one.

    Errors: ValueError for tensors that are not in the CPU's memory.
    """
    guarded: dict[int, Region] = {}
    storages: list[Region] = []
    for name, _, value in arguments:
        tensor = getattr(value, "base", value)  # `triton.reinterpret` wraps a tensor
        if not isinstance(tensor, Tensor):
            continue
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu":
            raise ValueError(
                f"{kernel}: argument {name} is on {tensor.device}; emulated kernels run on tensors of the CPU"
            )
        if (guard := find_guard(tensor)) is None:
            storages.append(Region(name, storage.data_ptr(), storage.nbytes()))
        else:
            view, owned = guard.view, guard.element_bytes
            nbytes = view.nbytes if owned is None else len(owned)
            guarded.setdefault(view.data_ptr(), Region(guard.name or name, view.data_ptr(), nbytes, owned))
    return [region for region in (*guarded.values(), *joined(storages)) if region.nbytes]


def joined(regions: Iterable[Region]) -> list[Region]:
    """The regions, those that share bytes as one, with the name of that which begins first."""
    result: list[Region] = []
    for region in sorted(regions, key=lambda region: region.start):
        last = result[-1] if result else None
        if last is None or region.start >= last.high:
            result.append(region)
        elif region.high > last.high:
            result[-1] = Region(last.name, last.start, region.high - last.start)
    return result
