"""Division by a number of the host, as CUDA computes it."""

from typing import Any

import torch
from torch import Tensor


def divide_by_reciprocal(x: Tensor, number: Any) -> Tensor:
    """Returns x / number as CUDA computes it: times the reciprocal of the number, in float32 (in
    float64 for float64).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(dtype) * (1 / torch.tensor(float(number), dtype=dtype))).to(x.dtype)


def divide_by_reciprocal_(x: Tensor, number: Any) -> Tensor:
    """Divides x in place; see `divide_by_reciprocal`."""
    return x.copy_(divide_by_reciprocal(x, number))
