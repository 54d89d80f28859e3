"""The matrix product with a weight that is a plain tensor or int4."""
# pyright: reportInvalidTypeForm=false

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.registry import IntRange, op

from .dtypes import DTYPES, dtype_name, random_tensor
from .int4 import Int4, cancelling_rows, int4_matmul, zero_rows
from .shapes import check_axes, check_floating


@op
def linear(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None) -> Tensor:
    """x · wᵀ + bias: x [..., k], w [n, k], bias [n] -> [..., n]; an `Int4` weight goes to `int4_matmul`."""
    if isinstance(w, Int4):
        return int4_matmul(x, w, bias)
    return F.linear(x, w, bias)


@linear.requires
def _(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None) -> None:
    weight = {"w.scales": (w.scales, "G n")} if isinstance(w, Int4) else {"w": (w, "n k")}
    check_axes("linear", x=(x, "... k"), **weight, **({} if bias is None else {"bias": (bias, "n")}))
    check_floating(
        "linear", x=x, **({} if isinstance(w, Int4) else {"w": w}), **({} if bias is None else {"bias": bias})
    )


@linear.example_inputs
def _(m: IntRange(1, 40), n: IntRange(1, 80), k: IntRange(1, 200), dtype: DTYPES, *, rng: torch.Generator, device: str):
    x, w, bias = (random_tensor(*s, dtype=dtype, rng=rng, device=device) for s in ((m, k), (n, k), (n,)))
    return x, w, bias


@linear.hard_case("cancelling_sums")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Weights that are nearly 1, see `cancelling_rows`."""
    x, w, bias = args
    return cancelling_rows(x), 1 + w / 16, bias


linear.hard_case("zero_rows")(zero_rows)


linear.fake_impl(lambda x, w, bias: x.new_empty(*x.shape[:-1], len(w)))


@linear.sizes_from_args("m")
def _(x, w, bias=None):
    n, k = w.shape
    return dict(m=x.shape[:-1].numel(), n=n, k=k, dtype=dtype_name(x.dtype))


@linear.flops_and_bytes
def _(m, n, k, dtype):
    return 2 * m * n * k, (m * k + n * k + n + m * n) * getattr(torch, dtype).itemsize
