"""The dtypes ops run in, the one their sums are taken in, and random tensors for examples."""

import torch
from torch import Tensor

from vila_triton.registry import OneOf

DTYPES = OneOf("float32", "float16", "bfloat16")


def upcast(x: Tensor) -> Tensor:
    """x in the dtype sums are taken in: float32, or float64 if x is that."""
    return x if x.dtype == torch.float64 else x.float()


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as domains name it: "float16"."""
    return str(dtype).removeprefix("torch.")


def random_tensor(*shape: int, dtype: str, rng: torch.Generator, device: str, scale: float = 1.0) -> Tensor:
    """Normal numbers of the given dtype, drawn on the CPU so that a seed means the same on every device."""
    return (torch.randn(*shape, generator=rng) * scale).to(device, getattr(torch, dtype))
