"""The matrix product with a weight that is a plain tensor or int4."""
# pyright: reportInvalidTypeForm=false

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.registry import IntRange, OneOf, op

from .dtypes import DTYPES, dtype_name, random_tensor
from .int4 import cancelling_rows, int4_matmul, zero_rows
from .int4_backward import int4_matmul_backward
from .int4_weight import Int4
from .shapes import check_axes, check_floating, check_residual


@op(autocasts=True)
def linear(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x · wᵀ + bias + residual: x [..., k], w [n, k], bias [n], residual [..., n] -> [..., n]; an `Int4` weight goes to
    `int4_matmul`.

    One sum, rounded once, but for a bias and a residual together, for which torch has no product.
    """
    if isinstance(w, Int4):
        return int4_matmul(x, w, bias, residual)
    if residual is None:
        return F.linear(x, w, bias)
    if bias is not None:
        return F.linear(x, w, bias) + residual
    return torch.addmm(residual.reshape(-1, len(w)), x.reshape(-1, x.shape[-1]), w.t()).view(residual.shape)


@linear.requires
def _(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    weight = {"w.scales": (w.scales, "G n")} if isinstance(w, Int4) else {"w": (w, "n k")}
    check_axes("linear", x=(x, "... k"), **weight, **({} if bias is None else {"bias": (bias, "n")}))
    check_floating(
        "linear", x=x, **({} if isinstance(w, Int4) else {"w": w}), **({} if bias is None else {"bias": bias})
    )
    if residual is not None:
        check_residual("linear", x, residual, w.shape[0])


@linear.example_inputs
def _(
    m: IntRange(1, 40),
    n: IntRange(1, 80),
    k: IntRange(1, 200),
    dtype: DTYPES,
    bias: OneOf(True, False) = True,
    residual: OneOf(False, True) = False,
    *,
    rng: torch.Generator,
    device: str,
):
    shapes = ((m, k), True), ((n, k), True), ((n,), bias), ((m, n), residual)
    return tuple(random_tensor(*s, dtype=dtype, rng=rng, device=device) if given else None for s, given in shapes)


@linear.hard_case("cancelling_sums")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Weights that are nearly 1, see `cancelling_rows`."""
    x, w, *rest = args
    return cancelling_rows(x), 1 + w / 16, *rest


linear.hard_case("zero_rows")(zero_rows)


@linear.gradient(x="w", w="x", bias="", residual="")
def _(*, grad, needs, x, w, bias, residual):
    """x̄ = ȳ · w and w̄ = ȳᵀ · x: products of transposed views."""
    grad_x = grad_w = grad_bias = None
    rows = grad.reshape(-1, grad.shape[-1])
    if "x" in needs:
        grad_x = int4_matmul_backward(grad, w) if isinstance(w, Int4) else linear(grad, w.t())
    if "w" in needs:
        x = x.reshape(-1, x.shape[-1])
        grad_w = linear(rows.t(), x.t()) if len(rows) else rows.new_zeros(rows.shape[1], x.shape[1])
    if "bias" in needs:
        grad_bias = rows.sum(0)
    return grad_x, grad_w, grad_bias, grad


linear.fake_impl(lambda x, w, bias, residual: x.new_empty(*x.shape[:-1], len(w)))


@linear.sizes_from_args("m")
def _(x, w, bias=None, residual=None):
    n, k = w.shape
    m, dtype = x.shape[:-1].numel(), dtype_name(x.dtype)
    return dict(m=m, n=n, k=k, dtype=dtype, bias=bias is not None, residual=residual is not None)


@linear.flops_and_bytes
def _(m, n, k, dtype, bias=True, residual=False):
    return 2 * m * n * k, (m * k + n * k + n * bias + m * n * (1 + residual)) * getattr(torch, dtype).itemsize
