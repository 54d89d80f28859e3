"""Kernels have no gradient, nor has what lies in the KV cache, and asking for one raises an error.

Without this, torch would silently treat the results of a kernel, and cached keys and values, as constants.
"""

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient raises an error; it keeps no graph of the arguments alive."""

    @staticmethod
    def forward(ctx: Any, message: str, out: Tensor, grad_anchor: Tensor) -> Tensor:
        ctx.message = message
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def without_gradient(x: Tensor, message: str) -> Tensor:
    """The same numbers; asking for their gradient raises RuntimeError with the message."""
    return NoGradient.apply(message, x.detach(), torch.empty(0, requires_grad=True))  # pyright: ignore[reportReturnType]


def forbid_gradient(op: str, impl: str, out: Any, *args: Any) -> Any:
    """The results of a call; asking them for the gradient that an argument requires raises RuntimeError."""
    if not torch.is_grad_enabled():
        return out
    leaves = [getattr(x, f.name) for x in args if is_dataclass(x) for f in fields(x)]
    if not any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *leaves)):
        return out
    message = f'{op}: {impl!r} has no gradient; `with use({op}="reference")` runs the reference, which has one'

    def forbid(x: Any) -> Any:
        is_new = isinstance(x, Tensor) and x.is_floating_point() and all(x is not y for y in args)
        return without_gradient(x, message) if is_new and not x.requires_grad else x

    return tuple(map(forbid, out)) if isinstance(out, tuple) else forbid(out)
