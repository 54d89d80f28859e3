"""Guarded memory: tensors between margins of NaN, in which stray reads and writes of a kernel are detected."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args
from unittest.mock import patch
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# aligned   contiguous, at an address that is a multiple of ALIGNMENT bytes, as in what is timed
# strided   odd strides in any order of the axes, at an odd element
# Triton compiles a separate kernel for each, as it specializes on strides of 1 and on multiples of 16.
MemoryLayout = Literal["aligned", "strided"]
MEMORY_LAYOUTS: tuple[MemoryLayout, ...] = get_args(MemoryLayout)
ALIGNMENT = 128


class MismatchError(AssertionError):
    """The result of an implementation differs from that of its op.

    kind          the check that failed, in two or three words
    tensor_name   the tensor that is wrong, as "output 0" or "argument k_pages"; the following have its shape
    actual        its values
    expected      the values it should have, in float64 where there is a budget
    budget        the error that each element may have; None if no bit may differ
    """

    def __init__(
        self,
        kind: str,
        message: str,
        tensor_name: str = "",
        actual: Tensor | None = None,
        expected: Tensor | None = None,
        budget: Tensor | None = None,
    ):
        super().__init__(message)
        self.kind, self.tensor_name = kind, tensor_name
        self.actual, self.expected, self.budget = actual, expected, budget


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A copy of a tree of tuples, dataclasses (as Int4) and numbers, with fn applied to its tensors."""
    if isinstance(value, Tensor):
        return fn(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(fn, getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(fn, v) for v in value)
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    leaves: list[Tensor] = []
    map_tensors(lambda t: leaves.append(t) or t, value)
    return leaves


def bit_pattern(x: Tensor) -> Tensor:
    """The values as integers, so that NaN equals NaN and 0 differs from -0."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Returns True if two tensors have the same shape and bits, so that NaN equals NaN and 0 differs from -0."""
    return torch.equal(bit_pattern(x), bit_pattern(y))


def poison(x: Tensor, integer: int) -> Tensor:
    """Fills a tensor in place with NaN, or with `integer` if it is not of floating point, and returns it."""
    return x.fill_(float("nan") if x.is_floating_point() else integer)


@dataclass
class GuardedTensor:
    """A tensor inside a larger buffer full of NaN. name: that of the argument it holds, if it is one."""

    view: Tensor
    buffer: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        self.expected = self.buffer.clone()
        live_guards[self.buffer.data_ptr()] = self

    def set_expected(self, values: Tensor) -> None:
        """Expect these values in the view from now on."""
        self.expected.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).copy_(values)

    def is_intact(self) -> bool:
        return same_bits(self.buffer, self.expected)

    def describe_damage(self) -> str:
        """The elements of the buffer that are not as expected, counted from the first element of the view."""
        changed = (bit_pattern(self.buffer) != bit_pattern(self.expected)).nonzero()[:, 0]
        first, last = (int(changed[i]) - int(self.view.storage_offset()) for i in (0, -1))
        end = sum((n - 1) * stride for n, stride in zip(self.view.shape, self.view.stride()))
        return f"{len(changed)} elements, the first at {first:+}, the last at {last:+}; its own end at {end:+}"

    @cached_property
    def element_bytes(self) -> np.ndarray | None:
        """Which bytes, from the first element's to the last one's, are of an element; None if all of them are."""
        end = sum((n - 1) * stride for n, stride in zip(self.view.shape, self.view.stride())) + 1
        if end == self.view.numel():
            return None
        is_element = np.zeros(end, bool)
        strides = self.view.stride()  # in elements, each one byte of `is_element`
        np.lib.stride_tricks.as_strided(is_element, self.view.shape, strides)[...] = True
        return is_element.repeat(self.view.itemsize)

    def reads_outside(self, addresses: np.ndarray) -> bool:
        """True if one of the addresses is in the buffer, but not at an element of the view."""
        offsets = addresses.astype(np.int64) - self.buffer.data_ptr()
        offsets = offsets[(offsets >= 0) & (offsets < self.buffer.nbytes)] // self.buffer.itemsize
        remainders = offsets - int(self.view.storage_offset())
        is_element = remainders >= 0
        for stride, n in sorted(zip(self.view.stride(), self.view.shape), reverse=True):
            index = np.minimum(remainders // stride, n - 1)
            remainders = remainders - index * stride
        return not (is_element & (remainders == 0)).all()


live_guards: WeakValueDictionary[int, GuardedTensor] = WeakValueDictionary()  # address of a buffer -> its guard


def find_guard(x: Tensor) -> GuardedTensor | None:
    """The guard in whose buffer a tensor lies, or None."""
    return live_guards.get(x.untyped_storage().data_ptr())


def guard_tensor(x: Tensor, rng: torch.Generator, layout: MemoryLayout = "strided") -> GuardedTensor:
    """The values of x as a view of that layout; all between and around its elements is NaN.

    Integers are surrounded by 1 or -1: a wrong code, page or length, yet no address that would end the process.
    """
    contiguous = torch.empty(x.shape, device="meta").stride()
    strides, size = odd_strides(x, rng) if layout == "strided" else (contiguous, x.numel())
    margin = min(max(4096, 129 * max(strides, default=1)), 2**20) | 1
    integer = 1 if torch.rand((), generator=rng) < 0.5 else -1
    buffer = poison(torch.empty(size + 2 * margin + ALIGNMENT, dtype=x.dtype, device=x.device), integer)
    if layout == "aligned":
        margin += -(buffer.data_ptr() // x.itemsize + margin) % (ALIGNMENT // x.itemsize)
    view = buffer.as_strided(x.shape, strides, margin)
    view.copy_(x)
    return GuardedTensor(view, buffer)


def odd_strides(x: Tensor, rng: torch.Generator) -> tuple[list[int], int]:
    """Strides with gaps, for the axes in a random order, and the most elements that they span."""
    axes = torch.randperm(x.dim(), generator=rng).tolist() if x.dim() else []  # outermost axis first
    gaps = torch.randint(1, 3, (x.dim(),), generator=rng).tolist()
    strides, size = [0] * x.dim(), 1
    for axis, gap in zip(reversed(axes), gaps):
        strides[axis] = size * gap + (size > 1)
        size = strides[axis] * (x.shape[axis] + 1)
    return strides, size


class _GuardedAllocations(TorchDispatchMode):
    """Hands out new tensors as views into NaN-filled buffers."""

    factories = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like")
    filled_factories = ("new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full")

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[GuardedTensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.factories + self.filled_factories or not out.numel():
            return out
        margin = min(max(4096, 128 * max(out.stride())), 2**20) // 64 * 64  # keeps the alignment torch promises
        size = 1 + sum((n - 1) * s for n, s in zip(out.shape, out.stride()))
        buffer = poison(torch.empty(size + 2 * margin, dtype=out.dtype, device=out.device), -1)
        view = buffer.as_strided(out.shape, out.stride(), margin)
        if not name.startswith(("empty", "new_empty")):
            view.copy_(out)
        self.allocations.append(GuardedTensor(view, buffer))
        return view


@contextmanager
def guarded_allocations(arguments: Sequence[GuardedTensor] = ()) -> Iterator[None]:
    """Inside, every tensor torch allocates starts as NaN and lies between margins that must be intact at the end.

    Interpreted kernels may not even read between or around the elements of those tensors and of the arguments.
    Errors: MismatchError.
    """
    violations: list[GuardedTensor] = []
    masked_load = interpreter.InterpreterBuilder.create_masked_load

    def checked_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        addresses = ptrs.data[mask.data.astype(bool)]
        violations.extend(g for g in (*arguments, *mode.allocations) if g.reads_outside(addresses))
        return masked_load(self, ptrs, mask, *args)

    with (
        _GuardedAllocations() as mode,
        patch.object(interpreter.InterpreterBuilder, "create_masked_load", checked_load),
    ):
        yield
    if violations:
        shape = list(violations[0].view.shape)
        owner = f"argument {violations[0].name}" if violations[0].name else "a tensor it allocated"
        raise MismatchError("read outside", f"read outside {owner}, of shape {shape}")
    for allocation in mode.allocations:
        allocation.set_expected(allocation.view)
        if not allocation.is_intact():
            shape = list(allocation.view.shape)
            message = f"wrote outside a tensor of shape {shape} it allocated: {allocation.describe_damage()}"
            raise MismatchError("wrote outside", message)
