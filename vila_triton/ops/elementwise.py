"""Norms, the rotary embedding and the gated activation: ops that treat every token alone."""
# pyright: reportInvalidTypeForm=false

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.registry import IntRange, op

from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .shapes import check_axes, check_finite, check_floating, check_same_dtype


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis; x [..., e], weight [e] (Zhang & Sennrich 2019)."""
    x_upcast = upcast(x)
    return (x_upcast * torch.rsqrt(x_upcast.square().mean(-1, keepdim=True) + eps) * upcast(weight)).to(x.dtype)


@rms_norm.requires
def _(x: Tensor, weight: Tensor, eps: float) -> None:
    check_axes("rms_norm", x=(x, "... e"), weight=(weight, "e"))
    check_floating("rms_norm", x=x, weight=weight)
    check_finite("rms_norm", eps=eps)


@rms_norm.example_inputs
def _(rows: IntRange(1, 40), e: IntRange(1, 300), dtype: DTYPES, *, rng: torch.Generator, device: str):
    return (
        random_tensor(rows, e, dtype=dtype, rng=rng, device=device),
        random_tensor(e, dtype=dtype, rng=rng, device=device),
        1e-5,
    )


@rms_norm.hard_case("uneven_rows")
def _uneven_rows(args: tuple, rng: torch.Generator) -> tuple:
    """Rows of numbers up to 40,000, whose squares float16 cannot hold, among rows down to a thousandth."""
    x, *rest = args
    return x * 2.0 ** torch.randint(-10, 14, (len(x), 1), generator=rng).to(x), *rest


@rms_norm.hard_case("constant_rows")
def _constant_rows(args: tuple, rng: torch.Generator) -> tuple:
    """Rows of one number each, and every other row of zeros."""
    x, *rest = args
    x = x[:, :1].expand_as(x).clone()
    x[1::2] = 0
    return x, *rest


rms_norm.fake_impl(lambda x, weight, eps: x.new_empty(x.shape))


@rms_norm.sizes_from_args("rows")
def _(x, weight, eps):
    return dict(rows=x.shape[:-1].numel(), e=len(weight), dtype=dtype_name(x.dtype))


@rms_norm.flops_and_bytes
def _(rows, e, dtype):
    return 4 * rows * e, (2 * rows * e + e) * getattr(torch, dtype).itemsize


@op
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last axis; x [..., e], weight, bias [e]. Ba et al. 2016."""
    return F.layer_norm(upcast(x), weight.shape, upcast(weight), upcast(bias), eps).to(x.dtype)


@layer_norm.gradient(x="x weight bias", weight="x weight bias", bias="x weight bias")
def _(grad, needs, x, weight, bias, eps):
    """By torch, with the mean and the variance of the forward pass computed again."""
    x_upcast, affine = upcast(x), (upcast(weight), upcast(bias))
    _, *statistics = torch.native_layer_norm(x_upcast, weight.shape, *affine, eps)
    grads = torch.ops.aten.native_layer_norm_backward(
        upcast(grad), x_upcast, weight.shape, *statistics, *affine, [name in needs for name in ("x", "weight", "bias")]
    )
    return tuple(
        None if value is None else value.to(like.dtype) for value, like in zip(grads, (x, weight, bias), strict=True)
    )


@layer_norm.requires
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_axes("layer_norm", x=(x, "... e"), weight=(weight, "e"), bias=(bias, "e"))
    check_floating("layer_norm", x=x, weight=weight, bias=bias)
    check_finite("layer_norm", eps=eps)


@layer_norm.example_inputs
def _(rows: IntRange(1, 40), e: IntRange(1, 300), dtype: DTYPES, *, rng: torch.Generator, device: str):
    x, weight, bias = (random_tensor(*s, dtype=dtype, rng=rng, device=device) for s in ((rows, e), (e,), (e,)))
    return x, weight, bias, 1e-6


layer_norm.hard_case("uneven_rows")(_uneven_rows)
layer_norm.hard_case("constant_rows")(_constant_rows)


layer_norm.fake_impl(lambda x, weight, bias, eps: x.new_empty(x.shape))


@layer_norm.sizes_from_args("rows")
def _(x, weight, bias, eps):
    return dict(rows=x.shape[:-1].numel(), e=len(weight), dtype=dtype_name(x.dtype))


@layer_norm.flops_and_bytes
def _(rows, e, dtype):
    return 8 * rows * e, (2 * rows * e + 2 * e) * getattr(torch, dtype).itemsize


@op(batch_invariant=True)
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of every head, as the rotary embedding does (Su et al. 2021).

    x [s, h, d]; cos and sin [s, r] in float32, of one angle a token and pair -> [s, h, d]. The pairs are those of
    Hugging Face's `rotate_half`.
    """
    low, high = upcast(x).chunk(2, dim=-1)  # [s, h, r] each
    cos, sin = cos[:, None].to(low.dtype), sin[:, None].to(low.dtype)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


@rope.requires
def _(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    sizes = check_axes("rope", x=(x, "s h d"), cos=(cos, "s r"), sin=(sin, "s r"))
    check_floating("rope", x=x, cos=cos, sin=sin)
    if sizes["d"] != 2 * sizes["r"]:
        raise ValueError(f"rope: x has head dim {sizes['d']}, but cos and sin hold {sizes['r']} pairs")


@rope.example_inputs
def _(s: IntRange(1, 40), h: IntRange(1, 9), r: IntRange(1, 64), dtype: DTYPES, *, rng: torch.Generator, device: str):
    angles = torch.rand(s, r, generator=rng) * 1000
    x = random_tensor(s, h, 2 * r, dtype=dtype, rng=rng, device=device)
    return x, angles.cos().to(device), angles.sin().to(device)


@rope.hard_case("quarter_turns")
def _quarter_turns(args: tuple, rng: torch.Generator) -> tuple:
    """Angles that are multiples of 90°, 0 among them, and large numbers."""
    x, cos, sin = args
    turns = torch.randint(4, cos.shape, generator=rng)
    cos, sin = (torch.tensor(values)[turns].to(cos) for values in ([1.0, 0, -1, 0], [0.0, 1, 0, -1]))
    return x * 2**12, cos, sin


@rope.gradient(x="cos sin")
def _(*, grad, needs, x, cos, sin):
    """Angles turned round: a rotation's transpose is its inverse."""
    return rope(grad, cos, -sin)


rope.fake_impl(lambda x, cos, sin: x.new_empty(x.shape))


@rope.sizes_from_args("s")
def _(x, cos, sin):
    s, h, d = x.shape
    return dict(s=s, h=h, r=d // 2, dtype=dtype_name(x.dtype))


@rope.flops_and_bytes
def _(s, h, r, dtype):
    return 6 * s * h * r, 4 * s * h * r * getattr(torch, dtype).itemsize + 8 * s * r


@op
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise; both [s, f] -> [s, f] (Shazeer 2020)."""
    return (F.silu(upcast(gate)) * upcast(up)).to(gate.dtype)


@swiglu.requires
def _(gate: Tensor, up: Tensor) -> None:
    check_axes("swiglu", gate=(gate, "s f"), up=(up, "s f"))
    check_floating("swiglu", gate=gate)
    check_same_dtype("swiglu", gate=gate, up=up)


@swiglu.example_inputs
def _(s: IntRange(1, 40), f: IntRange(1, 300), dtype: DTYPES, *, rng: torch.Generator, device: str):
    gate, up = (random_tensor(s, f, dtype=dtype, rng=rng, device=device, scale=3) for _ in range(2))
    return gate, up


@swiglu.hard_case("extreme_gates")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Gates of 0, and beyond the numbers whose exponentials float32 holds, 88; large ones with values of `up` near 0.

    None lies between -88 and -110, where silu is still a number, but not computed as the reference does it.
    """
    gate, up = args
    gates = torch.tensor([0.0, -0.0, 20, -20, 88, -88, 110, -110, 1000, -1000, 60000, -60000])
    gate = gates[torch.randint(len(gates), gate.shape, generator=rng)].to(gate)
    return gate, up / gate.abs().clamp(min=1)


swiglu.fake_impl(lambda gate, up: gate.new_empty(gate.shape))


@swiglu.sizes_from_args("s")
def _(gate, up):
    s, f = gate.shape
    return dict(s=s, f=f, dtype=dtype_name(gate.dtype))


@swiglu.flops_and_bytes
def _(s, f, dtype):
    return 5 * s * f, 3 * s * f * getattr(torch, dtype).itemsize
