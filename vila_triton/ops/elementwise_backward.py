"""The gradients of `rms_norm` and `swiglu`."""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import IntRange, op

from .backward import NO_SECOND_DERIVATIVE, take_hard_cases
from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .elementwise import rms_norm, swiglu
from .shapes import check_axes, check_finite, check_floating, check_same_dtype


@op
def rms_norm_backward(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of `rms_norm(x, weight, eps)`: grad_out and x [..., e], weight [e] -> (grad_x, grad_weight).

    With r = 1 / sqrt(mean(x²) + eps) and y = x · r, grad_x = r · (w - y · mean(w · y)) for w = grad_out · weight, and
    grad_weight is the sum of grad_out · y over all rows. Each is rounded once.
    """
    x_upcast, grad = upcast(x), upcast(grad_out)
    r = torch.rsqrt(x_upcast.square().mean(-1, keepdim=True) + eps)
    y, w = x_upcast * r, grad * upcast(weight)
    grad_x = r * (w - y * (w * y).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad * y).reshape(-1, len(weight)).sum(0).to(weight.dtype)


rms_norm_backward.no_gradient(NO_SECOND_DERIVATIVE)


@rms_norm.gradient(x="x weight", weight="x weight")
def _(grad, needs, x, weight, eps):
    return rms_norm_backward(grad, x, weight, eps)


@rms_norm_backward.requires
def _(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    check_axes("rms_norm_backward", grad_out=(grad_out, "... e"), x=(x, "... e"), weight=(weight, "e"))
    if grad_out.shape != x.shape:
        raise ValueError(f"rms_norm_backward: x has shape {list(x.shape)}, expected {list(grad_out.shape)}")
    check_floating("rms_norm_backward", x=x, weight=weight)
    check_same_dtype("rms_norm_backward", x=x, grad_out=grad_out)
    check_finite("rms_norm_backward", eps=eps)


@rms_norm_backward.example_inputs
def _(rows: IntRange(1, 40), e: IntRange(8, 300), dtype: DTYPES, *, rng: torch.Generator, device: str):
    """Of fewer columns one may be nearly the whole norm; its grad_x is then what rounding leaves of a difference."""
    args = rms_norm.make_example(rows, e, dtype, rng=rng, device=device)
    return random_tensor(rows, e, dtype=dtype, rng=rng, device=device), *args


take_hard_cases(rms_norm_backward, rms_norm)


rms_norm_backward.fake_impl(
    lambda grad_out, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


@rms_norm_backward.sizes_from_args("rows")
def _(grad_out, x, weight, eps):
    return dict(rows=x.shape[:-1].numel(), e=len(weight), dtype=dtype_name(x.dtype))


@rms_norm_backward.flops_and_bytes
def _(rows, e, dtype):
    return 11 * rows * e, (3 * rows * e + 2 * e) * getattr(torch, dtype).itemsize


@op
def swiglu_backward(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu(gate, up)`: grad_out, gate and up [s, f] -> (grad_gate, grad_up).

    With p = sigmoid(gate), grad_gate = grad_out · up · p · (1 + gate · (1 - p)) and grad_up = grad_out · gate · p.
    """
    grad, g = upcast(grad_out), upcast(gate)
    p = g.sigmoid()
    grad_gate = grad * upcast(up) * (p * (1 + g * (1 - p)))
    return grad_gate.to(gate.dtype), (grad * (g * p)).to(up.dtype)


swiglu_backward.no_gradient(NO_SECOND_DERIVATIVE)


@swiglu.gradient(gate="gate up", up="gate up")
def _(grad, needs, gate, up):
    return swiglu_backward(grad, gate, up)


@swiglu_backward.requires
def _(grad_out: Tensor, gate: Tensor, up: Tensor) -> None:
    check_axes("swiglu_backward", grad_out=(grad_out, "s f"), gate=(gate, "s f"), up=(up, "s f"))
    check_floating("swiglu_backward", gate=gate)
    check_same_dtype("swiglu_backward", gate=gate, up=up, grad_out=grad_out)


@swiglu_backward.example_inputs
def _(s: IntRange(1, 40), f: IntRange(1, 300), dtype: DTYPES, *, rng: torch.Generator, device: str):
    args = swiglu.make_example(s, f, dtype, rng=rng, device=device)
    return random_tensor(s, f, dtype=dtype, rng=rng, device=device), *args


@swiglu_backward.hard_case("extreme_gates")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Gates of 0, and beyond the numbers whose exponentials float32 holds, 88; large ones with values of `up` near 0.

    None lies between -80 and -110, where the sigmoid is still a number, but a subnormal one, which not every division
    on a GPU returns.
    """
    grad_out, gate, up = args
    gates = torch.tensor([0.0, -0.0, 20, -20, 80, -80, 110, -110, 1000, -1000, 60000, -60000])
    gate = gates[torch.randint(len(gates), gate.shape, generator=rng)].to(gate)
    return grad_out / gate.abs().clamp(min=1), gate, up


swiglu_backward.fake_impl(
    lambda grad_out, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)


@swiglu_backward.sizes_from_args("s")
def _(grad_out, gate, up):
    s, f = gate.shape
    return dict(s=s, f=f, dtype=dtype_name(gate.dtype))


@swiglu_backward.flops_and_bytes
def _(s, f, dtype):
    return 11 * s * f, 5 * s * f * getattr(torch, dtype).itemsize
