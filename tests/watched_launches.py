"""Launches of interpreted kernels, watched: which of their arguments they reach beyond 2³¹ elements.

Loop variables then have 32 bits as on a GPU; the interpreter's are Python's integers, which never overflow. And few
programs of a grid run, so that it may have millions.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from far_memory import LIMIT
from torch import Tensor
from triton.runtime import interpreter

FEW = 2**20  # elements, of which all addresses can be listed


class Reach:
    """`axes` holds every axis of every tensor that watched kernels took, as "kernel argument[-1]" for the last one.

    Its value is True if a kernel touched an element whose index along that axis alone puts it beyond 2³¹ elements.
    """

    def __init__(self) -> None:
        self.axes: dict[str, bool] = {}

    def add(self, kernel: str, argument: str, x: Tensor, addresses: np.ndarray) -> None:
        """Count in a tensor, of the addresses that the kernel touched in all of them."""
        index = touched_indices(x, addresses)
        for axis, stride in enumerate(x.stride()):
            name = f"{kernel} {argument}[{axis - x.dim()}]"
            self.axes[name] = self.axes.get(name, False) or bool((index[axis] * stride >= LIMIT).any())

    @property
    def missing(self) -> set[str]:
        """The axes along which nothing that far was touched."""
        return {name for name, is_reached in self.axes.items() if not is_reached}


def touched_indices(x: Tensor, addresses: np.ndarray) -> np.ndarray:
    """The indices [axis, element] of the elements of x at these addresses."""
    offsets = addresses.astype(np.int64) - x.data_ptr()
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    offsets = np.unique(offsets[(offsets >= 0) & (offsets < size * x.itemsize)] // x.itemsize)
    if x.numel() <= FEW:
        index = np.indices(x.shape).reshape(x.dim(), -1)
        return index[:, np.isin(np.array(x.stride()) @ index, offsets)]
    assert x.is_contiguous()
    index = np.empty((x.dim(), len(offsets)), np.int64)
    for axis, stride in enumerate(x.stride()):
        index[axis], offsets = np.divmod(offsets, stride)
    return index


MOST_ARRIVALS = 64  # programs


@contextmanager
def watched_launches(reach: Reach, first: int, last: int) -> Iterator[None]:
    """Inside, launches count in `reach`; of the first axis of a grid so many first and last programs run, but all of a
    small grid whose last program adds up what the others leave.

    Errors: IndexError where a kernel touches memory that none of its arguments lie in, which might end the process.
    """
    builder, executor, shared_builder = (
        interpreter.InterpreterBuilder,
        interpreter.GridExecutor,
        interpreter.interpreter_builder,
    )
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    patch_core = interpreter._patch_lang_core
    touched: list[np.ndarray] = []
    memories: set[tuple[int, int]] = set()  # the first byte of each, and the one after its last

    def record(ptrs: Any, mask: Any) -> None:
        addresses = ptrs.data[np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)]
        if not np.any([(addresses >= start) & (addresses < end) for start, end in memories], 0).all():
            raise IndexError("an address outside of the memory of all arguments")
        touched.append(addresses)

    def recorded_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        record(ptrs, mask)
        return load(self, ptrs, mask, *args)

    def recorded_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        record(ptrs, mask)
        return store(self, ptrs, value, mask, *args)

    def patch_core_and_range(lang: Any, scope: Any) -> None:
        patch_core(lang, scope)
        scope.set_attr(lang, "range", typed_range)

    def launch_some(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = tensor_arguments(self.fn, args, kwargs)
        storages = [x.untyped_storage() for _, x in arguments]
        memories.clear()
        memories.update((x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages)
        touched.clear()
        grid = (*self.grid, 1, 1)[:3]
        counts_arrivals = any(name == "counters_ptr" for name, _ in arguments)
        count = grid[0] if counts_arrivals and grid[0] <= MOST_ARRIVALS else min(grid[0], first + last)

        def set_grid_idx(x: int, y: int, z: int) -> None:
            shared_builder.grid_idx = (x if x < first else grid[0] - count + x, y, z)

        with (
            patch.object(self, "grid", (count, *grid[1:])),
            patch.object(shared_builder, "set_grid_dim", lambda *_: setattr(shared_builder, "grid_dim", grid)),
            patch.object(shared_builder, "set_grid_idx", set_grid_idx),
            patch.dict(self.fn.__globals__, {"range": typed_range}),
        ):
            launch(self, *args, **kwargs)
        for argument, x in arguments:
            if argument == "counters_ptr":  # which only the programs that were left out would have set back
                x.zero_()
            reach.add(self.fn.__name__, argument, x, np.unique(np.concatenate(touched)))

    with (
        patch.object(builder, "create_masked_load", recorded_load),
        patch.object(builder, "create_masked_store", recorded_store),
        patch.object(interpreter, "_patch_lang_core", patch_core_and_range),
        patch.object(executor, "__call__", launch_some),
    ):
        yield


def typed_range(*bounds: Any, **_: Any) -> Iterator[Any]:
    """`range` as it is on a GPU: of int64 scalars if a bound is one, else of int32."""
    is_wide = any(isinstance(x, tl.tensor) and x.dtype == tl.int64 for x in bounds)
    dtype, numpy_dtype = (tl.int64, np.int64) if is_wide else (tl.int32, np.int32)
    for i in range(*bounds):
        yield tl.tensor(interpreter.TensorHandle(np.array([i], numpy_dtype), dtype), dtype)


def tensor_arguments(fn: Callable[..., Any], args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a launch by the names of the kernel's parameters; those of tuples as w[0], w[1]."""
    names = inspect.signature(fn).parameters
    values = inspect.getcallargs(fn, *args, **{name: x for name, x in kwargs.items() if name in names})
    named = [
        pair
        for name, value in values.items()
        for pair in (
            [(f"{name}[{i}]", x) for i, x in enumerate(value)] if isinstance(value, tuple) else [(name, value)]
        )
    ]
    return [(name, x) for name, x in named if isinstance(x, Tensor)]
