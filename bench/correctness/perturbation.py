"""Perturbations of the arguments of a call, each number by one rounding, which give the conditioning of its outputs."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vila_triton.ops import QuantizedKVPages

from .guarded_memory import map_tensors, tensors


def unit_roundoff(dtype: torch.dtype) -> float:
    """Returns the largest relative error of rounding a number to a floating-point dtype: half its machine epsilon."""
    return torch.finfo(dtype).eps / 2


def random_bools(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Fair coin tosses of this shape, drawn on the device of the generator, eight from a random byte."""
    count = shape.numel()
    random_bytes = torch.empty(-(-count // 8), dtype=torch.uint8, device=rng.device).random_(0, 256, generator=rng)
    bit_masks = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=rng.device)
    return (random_bytes & bit_masks[:, None]).ne(0).flatten()[:count].view(shape)


def perturbed_args(args: Any, rng: torch.Generator, in_float64: bool) -> Iterator[Any]:
    """Endless perturbations of the arguments: each number moves up or down by one rounding unit of its dtype.

    in_float64: return float64 tensors, each number moved by half of that. Integers stay as they are: they are codes,
    and arithmetic on them is exact. The scales of quantized pages move, in float64, by a rounding of the coarsest dtype
    beside them, since references round to that what they dequantize.
    """
    scales = {id(x) for x in quantized_scales(args)}
    coarsest = max((unit_roundoff(x.dtype) for x in tensors(args) if x.is_floating_point()), default=0.0)

    def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
        unit = coarsest if in_float64 and id(x) in scales else unit_roundoff(x.dtype)
        step = unit * (1 if in_float64 else 2)
        exact, is_integer = x.double(), x == x.round()
        low, high = (torch.where(is_integer, exact, exact * (1 + s)) for s in (-step, step))
        return (low, high) if in_float64 else (low.to(x.dtype), high.to(x.dtype))

    def pick_bound(pairs: Iterator[tuple[Tensor, Tensor] | None], x: Tensor) -> Tensor:
        pair = next(pairs)
        return torch.where(random_bools(x.shape, rng), *pair) if pair else x

    pairs = [bounds(x) if x.is_floating_point() else None for x in tensors(args)]
    while True:
        yield map_tensors(partial(pick_bound, iter(pairs)), args)


def quantized_scales(value: Any) -> Iterator[Tensor]:
    """The scales of the quantized pages in a tree of arguments."""
    if isinstance(value, QuantizedKVPages):
        yield value.scales
    elif is_dataclass(value) or isinstance(value, tuple | list):
        inner = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else value
        for x in inner:
            yield from quantized_scales(x)
