"""Writes what interpreted kernels return to a file: `TRITON_INTERPRET=1 python interpreted_outputs.py FILE`."""

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bench.correctness.compiled_plan import choice_axes, draw_sizes
from bench.correctness.error_budget import Example
from bench.correctness.example_plan import planned_example
from bench.correctness.guarded_memory import map_tensors, tensors
from vila_triton.registry import OPS, Impl, discover
from vila_triton.registry.interpreter import uses_triton_kernels

DTYPES = ("float16", "float32")  # the interpreter has no other


def calls() -> Iterator[tuple[str, Impl, Example]]:
    """A name, the first Triton implementation of each op, and an example of it in each dtype; of gradients, which take
    longest, in the first.
    """
    discover()
    for op in OPS.values():
        for impl in islice(filter(uses_triton_kernels, op.impls.values()), 1):
            for dtype in DTYPES[:1] if op.name.endswith("_backward") else DTYPES:
                row = {**{name: values[0] for name, values in choice_axes(op).items()}, "dtype": dtype}
                sizes = draw_sizes(op, impl.configs[0], row, "ragged", 0)
                yield f"{op.name}-{dtype}", impl, planned_example(op, sizes)


def outputs_of(impl: Impl, example: Example) -> list[Tensor]:
    """The outputs of a call and, as of an op that writes in place, its arguments after it."""
    args: Any = map_tensors(torch.clone, example.args)
    outputs = tensors(impl(*args, config=impl.configs[0]))
    return [*outputs, *tensors(args)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save({name: outputs_of(impl, example) for name, impl, example in calls()}, sys.argv[1])
