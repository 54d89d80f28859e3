"""The gradients of `int4_matmul` and `int4_swiglu` with respect to all but the weight: 4-bit codes have none."""
# pyright: reportInvalidTypeForm=false

from dataclasses import replace

import torch
from torch import Tensor

from vila_triton.registry import IntRange, OneOf, op

from .backward import NO_SECOND_DERIVATIVE
from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .elementwise_backward import swiglu_backward
from .int4 import (
    cancelling_rows,
    check_int4_weight,
    int4_matmul,
    int4_swiglu,
    random_int4,
    unlike_groups,
    zero_rows,
)
from .int4_tiles import pack_tiles
from .int4_weight import Int4, dequantize


@op
def int4_matmul_backward(grad_out: Tensor, w: Int4) -> Tensor:
    """The gradient of `int4_matmul(x, w)` with respect to x, grad_out · w: grad_out [..., n], w [n, k] in 4 bits ->
    [..., k], rounded once. The weight is dequantized as in the forward pass, in the dtype of grad_out.
    """
    return (upcast(grad_out) @ upcast(dequantize(w, grad_out.dtype))).to(grad_out.dtype)


int4_matmul_backward.no_gradient(NO_SECOND_DERIVATIVE)


@int4_matmul.gradient(x="w", bias="", residual="")
def _(grad, needs, x, w, bias, residual):
    grad_x = int4_matmul_backward(grad, w) if "x" in needs else None
    return grad_x, grad.reshape(-1, grad.shape[-1]).sum(0) if "bias" in needs else None, grad


@int4_swiglu.gradient(x="x gate up")
def _(grad, needs, x, gate, up):
    """The two products are computed again, in the dtype of x."""
    rows, n = x.reshape(-1, x.shape[-1]), gate.shape[0]  # [m, k]
    grad_gate, grad_up = swiglu_backward(grad.reshape(-1, n), int4_matmul(rows, gate), int4_matmul(rows, up))
    return (int4_matmul_backward(grad_gate, gate) + int4_matmul_backward(grad_up, up)).view(x.shape)


@int4_matmul_backward.requires
def _(grad_out: Tensor, w: Int4) -> None:
    check_int4_weight("int4_matmul_backward", "w", w, grad_out=(grad_out, "... n"))


@int4_matmul_backward.example_inputs
def _(
    m: IntRange(1, 40),
    n: IntRange(1, 80),
    G: IntRange(1, 5),
    group: OneOf(64, 32, 128, 80),
    dtype: DTYPES,
    order: OneOf("sub", "fma"),
    *,
    rng: torch.Generator,
    device: str,
):
    w = random_int4(n, G, group, dtype, order, rng, device)
    return random_tensor(m, n, dtype=dtype, rng=rng, device=device), w


@int4_matmul_backward.hard_case("cancelling_sums")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Sums beyond float16 that cancel, see `cancelling_rows`: all weights are 12 to 15 times one scale."""
    grad_out, w = args
    qweight = pack_tiles(torch.randint(12, 16, w.shape, generator=rng)).to(w.qweight.device)
    scales, zeros = w.scales[:1, :1].expand_as(w.scales).clone(), torch.zeros_like(w.zeros)
    return cancelling_rows(grad_out), replace(w, qweight=qweight, scales=scales, zeros=zeros)


@int4_matmul_backward.hard_case("unlike_groups")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Scales over twelve powers of two, and zero points unlike those of the groups before."""
    grad_out, w = args
    return grad_out, unlike_groups(grad_out.new_empty(0, w.shape[1]), w)[1][0]


int4_matmul_backward.hard_case("zero_rows")(zero_rows)


int4_matmul_backward.fake_impl(lambda grad_out, w: grad_out.new_empty(*grad_out.shape[:-1], w.shape[1]))


@int4_matmul_backward.sizes_from_args("m")
def _(grad_out, w):
    n, k = w.shape
    m, dtype = grad_out.shape[:-1].numel(), dtype_name(grad_out.dtype)
    return dict(m=m, n=n, G=k // w.group_size, group=w.group_size, dtype=dtype, order=w.rounding)


@int4_matmul_backward.flops_and_bytes
def _(m, n, G, group, dtype, order):
    k, size = G * group, getattr(torch, dtype).itemsize
    return 2 * m * n * k, n * k // 2 + (2 * n * G + m * k + m * n) * size
