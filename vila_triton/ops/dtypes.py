"""The dtypes that ops run in and take their sums in, and random tensors for examples."""

import torch
from torch import Tensor

from vila_triton.registry import OneOf

DTYPES = OneOf("float32", "float16", "bfloat16")


def upcast(x: Tensor) -> Tensor:
    """x in the dtype that sums are taken in: float64 stays float64, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in an op's domain: "float16"."""
    return str(dtype).removeprefix("torch.")


def device_of_draws(device: str) -> str | None:
    """The device on which random numbers for a tensor on `device` are drawn: None, the default one, which is the CPU
    unless a caller sets another. Tensors on the device "meta" hold no numbers, and none are drawn for them.
    """
    return "meta" if device == "meta" else None


def random_tensor(*shape: int, dtype: str, rng: torch.Generator, device: str, scale: float = 1.0) -> Tensor:
    """Standard normal numbers times `scale`, the same on every device for a seed (see `device_of_draws`)."""
    drawn = torch.randn(*shape, generator=rng, device=device_of_draws(device))
    return (drawn * scale).to(device, getattr(torch, dtype))
