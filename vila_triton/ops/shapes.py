"""Checks of shapes and dtypes: a call of an op with the wrong ones fails before anything runs."""

import math
import numbers
from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class TensorLike(Protocol):
    """A tensor, or a class of several tensors that stands for one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...


@cache
def axis_letters(pattern: str) -> tuple[str, ...]:
    """Return the axes of a pattern: `... e` becomes ('...', 'e')."""
    return tuple(pattern.split())


def check_axes(op_name: str, **tensors: tuple[TensorLike, str]) -> dict[str, int]:
    """Match each tensor against its axis letters, which must mean the same size everywhere; returns the sizes.

    ``check_axes("rms_norm", x=(x, "... e"), weight=(weight, "e"))``; a leading ``...`` stands for any axes.
    Raises ValueError naming the op, the argument, its shape and the expected one, or devices that differ; TypeError for
    an argument that is no tensor.
    """
    for name, (x, _) in tensors.items():
        if not isinstance(getattr(x, "device", None), torch.device):
            raise TypeError(f"{op_name}: {name} is a {type(x).__name__}, expected a tensor")
    sizes: dict[str, int] = {}
    device = next(iter(tensors.values()))[0].device
    for name, (x, pattern) in tensors.items():
        letters, shape = axis_letters(pattern), x.shape
        if letters[0] == "...":
            letters = letters[1:]
            shape = shape[len(shape) - len(letters) :]
        if len(shape) != len(letters) or [a for a, n in zip(letters, shape) if sizes.get(a, n) != n]:
            expected = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
            raise ValueError(f"{op_name}: {name} has shape {list(x.shape)}, expected [{expected}]")
        if x.device != device:
            raise ValueError(f"{op_name}: {name} is on {x.device}, expected {device} like the first argument")
        sizes.update(zip(letters, shape))
    return sizes


def check_same_dtype(op_name: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all the tensors have the dtype of the first."""
    (first, x), *others = tensors.items()
    for name, y in others:
        if y.dtype != x.dtype:
            raise ValueError(f"{op_name}: {name} is {y.dtype}, expected {x.dtype} like {first}")


def check_residual(op_name: str, x: Tensor, residual: Tensor, n: int) -> None:
    """Raise ValueError unless a residual is [..., n] for x [..., k], in its dtype and on its device; TypeError if it is
    no tensor.
    """
    check_axes(op_name, x=(x, "... k"), residual=(residual, "... n"))
    if residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"{op_name}: residual has shape {list(residual.shape)}, expected {[*x.shape[:-1], n]}")
    check_same_dtype(op_name, x=x, residual=residual)


def check_dtype(op_name: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Raise ValueError unless all the tensors have this dtype."""
    for name, x in tensors.items():
        if x.dtype != dtype:
            raise ValueError(f"{op_name}: {name} is {x.dtype}, expected {dtype}")


def check_floating(op_name: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all the tensors have a floating-point dtype."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{op_name}: {name} is {x.dtype}, expected a floating-point dtype")


def check_finite(op_name: str, **values: float) -> None:
    """Raise TypeError unless all the values are numbers, ValueError unless they are finite."""
    for name, x in values.items():
        if not isinstance(x, numbers.Real | torch.SymFloat | torch.SymInt):
            raise TypeError(f"{op_name}: {name} is a {type(x).__name__}, expected a number")
        if isinstance(x, float) and not math.isfinite(x):
            raise ValueError(f"{op_name}: {name} is {x}, expected a finite number")


def check_type(op_name: str, expected: type, **values: object) -> None:
    """Raise TypeError unless all the values are instances of a class."""
    for name, x in values.items():
        if not isinstance(x, expected):
            raise TypeError(f"{op_name}: {name} is a {type(x).__name__}, expected a {expected.__name__}")
