"""Functions of Triton's language that need much: tables, local memory, carries, scans, sorts, rare instructions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from bench.emulator import emulating

N = 256


@triton.jit
def function_kernel(x_ptr, out_ptr, NAME: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if NAME == "sin":  # reduces large angles by a table, in an array of local memory
        y = tl.sin(x * 1e5)
    elif NAME == "erf":
        y = tl.erf(x)
    elif NAME == "pow":
        y = libdevice.pow(tl.abs(x), x)
    elif NAME == "log1p":
        y = libdevice.log1p(tl.abs(x))
    elif NAME == "exp, float64":
        y = tl.exp(x.to(tl.float64)).to(tl.float32)
    elif NAME == "sin, float64":  # calls a function
        y = tl.sin(x.to(tl.float64) * 1e5).to(tl.float32)
    elif NAME == "divisions, int64":
        large = (x * 1e10).to(tl.int64)
        y = (large // 12345 - large % 678).to(tl.float32)
    elif NAME == "divisions, int32":
        y = (i * 7919 // (i + 3) - (i * 1000) % (i + 7)).to(tl.float32)
    elif NAME == "upper half of a product":
        y = tl.umulhi((i * 123456789).to(tl.uint32), (i * 98765432).to(tl.uint32)).to(tl.float32)
    elif NAME == "float8":
        y = x.to(tl.float8e5).to(tl.float32)
    elif NAME == "cumsum":
        y = tl.cumsum((x * 100).to(tl.int32), 0).to(tl.float32)
    elif NAME == "sort":
        y = tl.sort(x)
    elif NAME == "argmax":
        y = (tl.argmax(x, 0) + i).to(tl.float32)
    elif NAME == "histogram":
        counts = tl.histogram((x * 3).to(tl.int32) & 15, 16)
        y = (counts.to(tl.float32)[None] + tl.zeros([N // 16, 16], tl.float32)).reshape(N)
    elif NAME == "gather":
        y = tl.gather(x, (i * 7) % N, 0)
    tl.store(out_ptr + i, y)


def divided(a: Tensor, b: Tensor | int) -> Tensor:
    """A quotient that is rounded towards zero."""
    return torch.div(a, b, rounding_mode="trunc")


def int64_divisions(x: Tensor) -> Tensor:
    large = (x * 1e10).long()
    return (divided(large, 12345) - torch.fmod(large, 678)).float()


def upper_halves(x: Tensor) -> Tensor:
    products = [(n * 123456789 % 2**32) * (n * 98765432 % 2**32) >> 32 for n in range(N)]
    return torch.tensor(products, dtype=torch.float64).float()


i = torch.arange(N)
WANT: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": lambda x: (x * 1e5).double().sin(),
    "erf": lambda x: x.double().erf(),
    "pow": lambda x: x.double().abs() ** x,
    "log1p": lambda x: x.double().abs().log1p(),
    "exp, float64": lambda x: x.double().exp().float(),
    "sin, float64": lambda x: (x.double() * 1e5).sin().float(),
    "divisions, int64": int64_divisions,
    "divisions, int32": lambda x: (divided(i * 7919, i + 3) - i * 1000 % (i + 7)).float(),
    "upper half of a product": upper_halves,
    "float8": lambda x: x.to(torch.float8_e5m2).float(),
    "cumsum": lambda x: (x * 100).int().cumsum(0).float(),
    "sort": lambda x: x.sort().values,
    "argmax": lambda x: (x.argmax() + i).float(),
    "histogram": lambda x: torch.bincount((x * 3).int() & 15, minlength=16).float().repeat(N // 16),
    "gather": lambda x: x[i * 7 % N],
}


ULPS = {"sin": 2, "erf": 2, "pow": 4, "log1p": 1}  # of CUDA's functions, by its programming guide; others are exact


@pytest.mark.parametrize("name", WANT)
def test_function(name: str) -> None:
    x = torch.randn(N, generator=torch.Generator().manual_seed(0))
    out = torch.full((N,), float("nan"))
    with emulating("sm_90"):
        function_kernel[(1,)](x, out, NAME=name, N=N)
    want = WANT[name](x)
    ulps = (out.double() - want.double()).abs().numpy() / np.spacing(want.float().abs().numpy())
    assert ulps.max() <= ULPS.get(name, 0) + (0.5 if want.dtype == torch.float64 else 0)


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    ("source", "to"),
    [(torch.float16, torch.float8_e5m2), (torch.float32, torch.float8_e4m3fn), (torch.float8_e4m3fn, torch.float16)],
)
def test_a_cast_of_fewer_numbers_than_its_instruction_takes(source: torch.dtype, to: torch.dtype) -> None:
    """A thread has one; what is made of the rest, which nothing wrote, is never stored."""
    x = torch.randn(128, generator=torch.Generator().manual_seed(0)).to(source)
    out = torch.zeros(128).to(to)
    with emulating("sm_90"):
        cast_kernel[(1,)](x, out, N=128)
    assert torch.equal(out.float(), x.float().to(to).float())
