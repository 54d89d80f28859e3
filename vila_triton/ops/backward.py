"""The parts that ops of gradients, NAME_backward of an op NAME, have in common.

Each takes the gradient of the result, `grad_out`, and of the forward pass what the gradients are made of, and returns
the gradients of the arguments that have one. It is an op like any other, with a reference, a domain and costs; its
examples and hard cases are those of its forward op, with a random `grad_out`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vila_triton.registry import Op

NO_SECOND_DERIVATIVE = "this is the backward pass of an op, and there is no second derivative"
Split = Callable[[tuple], tuple[Any, tuple]]
Join = Callable[[Any, tuple], tuple]


def split_first(args: tuple) -> tuple[Any, tuple]:
    """(grad_out, x, ...) -> grad_out and the arguments of the forward op, (x, ...)."""
    return args[0], args[1:]


def join_first(grad_out: Any, forward_args: tuple) -> tuple:
    """The inverse of `split_first`."""
    return grad_out, *forward_args


def take_hard_cases(backward: Op, forward: Op, split: Split = split_first, join: Join = join_first) -> None:
    """Register the hard cases of a forward op for its backward op.

    split: the arguments of the backward op -> grad_out and the arguments of the forward op; join: the inverse, which
    computes anew what the backward op takes of the results.
    """

    def changed(change: Callable[..., tuple], args: tuple, rng: torch.Generator) -> tuple:
        grad_out, forward_args = split(args)
        return join(grad_out, change(forward_args, rng))

    for name, change in forward.hard_cases.items():
        backward.hard_case(name)(partial(changed, change))
