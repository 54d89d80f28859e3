"""Matrix products with weights in 4 bits: x · wᵀ, and silu(x · gateᵀ) · (x · upᵀ) in one pass over x."""
# pyright: reportInvalidTypeForm=false

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vila_triton.registry import IntRange, OneOf, op

from .dtypes import DTYPES, device_of_draws, dtype_name, random_tensor, upcast
from .int4_tiles import pack_tiles, tiled_shape
from .int4_weight import Int4, check_int4_shape, check_rounding, dequantize
from .shapes import check_axes, check_floating, check_residual, check_same_dtype


def check_int4_weight(op_name: str, name: str, w: Int4, **beside: tuple[Tensor, str]) -> None:
    """Raise ValueError unless the tensors of a weight [n, k] fit one another and those beside it, as `check_axes` takes
    them: ``x=(x, "... k")``.
    """
    if not isinstance(w, Int4):
        raise ValueError(f"{op_name}: {name} is a {type(w).__name__}, expected an Int4")
    group_tensors = {f"{name}.scales": (w.scales, "G n"), f"{name}.zeros": (w.zeros, "G n")}
    first, *others = beside
    sizes = check_axes(op_name, **{first: beside[first]}, **group_tensors, **{key: beside[key] for key in others})
    check_int4_shape(sizes["G"] * w.group_size, w.group_size)
    check_rounding(op_name, w.rounding, f"{name}.rounding")
    if sizes.get("k", w.shape[1]) != w.shape[1]:
        raise ValueError(f"{op_name}: {first} has {sizes['k']} columns, but {name} is {list(w.shape)}")
    if w.qweight.shape != tiled_shape(*w.shape):
        raise ValueError(
            f"{op_name}: {name}.qweight has shape {list(w.qweight.shape)}, expected {list(tiled_shape(*w.shape))}"
        )
    if w.qweight.dtype != torch.int32:
        raise ValueError(f"{op_name}: {name}.qweight is {w.qweight.dtype}, expected torch.int32")
    if w.qweight.device != w.scales.device:
        raise ValueError(f"{op_name}: {name}.qweight is on {w.qweight.device}, expected {w.scales.device} like {first}")
    check_floating(op_name, **{key: x for key, (x, _) in (*beside.items(), *group_tensors.items())})


def check_int4_args(
    op_name: str, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, **weights: Int4
) -> None:
    """Raise ValueError unless the tensors of the weights [n, k] fit one another, x [..., k], the bias [n] and the
    residual [..., n].
    """
    for name, w in weights.items():
        check_int4_weight(op_name, name, w, x=(x, "... k"), **({} if bias is None else {"bias": (bias, "n")}))
    if bias is not None:
        check_same_dtype(op_name, x=x, bias=bias)
    if residual is not None:
        check_residual(op_name, x, residual, next(iter(weights.values())).shape[0])


@op(autocasts=True)
def int4_matmul(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x · wᵀ + bias + residual, w in 4 bits: x [..., k], w [n, k], bias [n], residual [..., n] -> [..., n] in x's
    dtype, rounded once. Lin et al. 2023 (AWQ).
    """
    out = F.linear(upcast(x), upcast(dequantize(w, x.dtype)), None if bias is None else upcast(bias))
    return (out if residual is None else out + upcast(residual)).to(x.dtype)


@int4_matmul.requires
def _(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    check_int4_args("int4_matmul", x, bias, residual, w=w)


def random_int4(n: int, G: int, group_size: int, dtype: str, rounding: Any, rng: torch.Generator, device: str) -> Int4:
    """A random weight that uses all codes and zero points, of values of about 1."""
    where = device_of_draws(device)
    q = torch.randint(0, 16, (n, G * group_size), generator=rng, device=where)
    scales = (torch.rand(G, n, generator=rng, device=where) + 0.5) / 15
    zeros = torch.randint(0, 16, (G, n), generator=rng, device=where)
    scales, zeros = (x.to(device, getattr(torch, dtype)) for x in (scales, zeros))
    return Int4(pack_tiles(q).to(device), scales, zeros, group_size, rounding)


@int4_matmul.example_inputs
def _(
    m: IntRange(1, 40),
    n: IntRange(1, 80),
    G: IntRange(1, 5),
    group: OneOf(64, 32, 128, 80),
    dtype: DTYPES,
    order: OneOf("sub", "fma"),
    bias: OneOf(False, True),
    residual: OneOf(False, True) = False,
    *,
    rng: torch.Generator,
    device: str,
):
    w = random_int4(n, G, group, dtype, order, rng, device)
    x = random_tensor(m, G * group, dtype=dtype, rng=rng, device=device)
    shapes = ((n,), bias), ((m, n), residual)
    return x, w, *(random_tensor(*s, dtype=dtype, rng=rng, device=device) if given else None for s, given in shapes)


def cancelling_rows(x: Tensor) -> Tensor:
    """Rows x [m, k] whose products with weights that are all about 1 come to 2¹⁸, four times what float16 holds, after
    half of the columns, and to about 0 after the other half.
    """
    k = x.shape[1]
    sign = torch.where(torch.arange(k, device=x.device) < k // 2, 1, -1)
    return (x.abs() + min(2**19 / k, 2.0**14)) * sign


def nearly_equal_weights(w: Int4, rng: torch.Generator) -> Int4:
    """The weight with numbers of one sign and of about one size in every row, 12 to 15 times its first scale."""
    is_positive = torch.randint(2, (w.shape[0],), generator=rng) > 0
    codes = torch.randint(12, 16, w.shape, generator=rng)
    qweight = pack_tiles(torch.where(is_positive[:, None], codes, 15 - codes)).to(w.qweight.device)
    zeros = torch.where(is_positive, 0, 15).to(w.zeros).expand_as(w.zeros).clone()
    return replace(w, qweight=qweight, scales=w.scales[:1].expand_as(w.scales).clone(), zeros=zeros)


@int4_matmul.hard_case("cancelling_sums")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Sums beyond float16 that cancel, see `cancelling_rows`."""
    x, w, *rest = args
    return cancelling_rows(x), nearly_equal_weights(w, rng), *rest


def unlike_groups(x: Tensor, *weights: Int4) -> tuple[Tensor, tuple[Int4, ...]]:
    """(x, weights) with scales over twelve powers of two, and x the other way, so that every group counts.

    Neither scale nor zero point is that of a group 1, 2, 4, 8, 16, ... before; both are alike after 77 groups only.
    """
    G, n = weights[0].scales.shape
    group, row = torch.arange(G, device=x.device)[:, None], torch.arange(n, device=x.device)
    powers = 2.0 ** (2 * (3 * group % 7) - 9)  # [G, 1]
    x = (rearrange(x, "m (G i) -> m G i", G=G) / powers.to(x)).flatten(1)
    zeros = (5 * (group % 11) + 3 * row) % 16
    return x, tuple(
        replace(w, scales=w.scales * powers.to(w.scales), zeros=(zeros + i).fmod(16).to(w.zeros))
        for i, w in enumerate(weights)
    )


@int4_matmul.hard_case("unlike_groups")
def _(args: tuple, rng: torch.Generator) -> tuple:
    x, w, *rest = args
    x, weights = unlike_groups(x, w)
    return x, *weights, *rest


@int4_matmul.hard_case("zero_rows")
def zero_rows(args: tuple, rng: torch.Generator) -> tuple:
    """Every other row of x is 0, the first among them."""
    x, *rest = args
    x[::2] = 0
    return x, *rest


int4_matmul.fake_impl(lambda x, w, bias, residual: x.new_empty(*x.shape[:-1], w.shape[0]))


@int4_matmul.sizes_from_args("m")
def _(x, w, bias=None, residual=None):
    n, k = w.shape
    m = x.shape[:-1].numel()
    return dict(
        m=m,
        n=n,
        G=k // w.group_size,
        group=w.group_size,
        dtype=dtype_name(x.dtype),
        order=w.rounding,
        bias=bias is not None,
        residual=residual is not None,
    )


@int4_matmul.flops_and_bytes
def _(m, n, G, group, dtype, order, bias, residual=False):
    k, size = G * group, getattr(torch, dtype).itemsize
    return 2 * m * n * k, n * k // 2 + (2 * n * G + m * k + m * n * (1 + residual) + n * bias) * size


@op(autocasts=True)
def int4_swiglu(x: Tensor, gate: Int4, up: Int4) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ): x [..., k], gate and up [n, k] in 4 bits -> [..., n]. Shazeer 2020 (SwiGLU)."""
    a, b = (F.linear(upcast(x), upcast(dequantize(w, x.dtype))) for w in (gate, up))
    return (F.silu(a) * b).to(x.dtype)


@int4_swiglu.requires
def _(x: Tensor, gate: Int4, up: Int4) -> None:
    check_int4_args("int4_swiglu", x, gate=gate, up=up)
    if (gate.shape, gate.group_size, gate.rounding) != (up.shape, up.group_size, up.rounding):
        raise ValueError(
            f"int4_swiglu: up is {list(up.shape)} in groups of {up.group_size}, rounding {up.rounding!r}, "
            f"expected {list(gate.shape)} in groups of {gate.group_size}, rounding {gate.rounding!r}, like gate"
        )


@int4_swiglu.example_inputs
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
    weights = (random_int4(n, G, group, dtype, order, rng, device) for _ in range(2))
    return random_tensor(m, G * group, dtype=dtype, rng=rng, device=device, scale=(G * group) ** -0.5), *weights


@int4_swiglu.hard_case("cancelling_sums")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Sums beyond float16 that cancel, see `cancelling_rows`; the gate is below 1 in the end."""
    x, gate, up = args
    gate, up = nearly_equal_weights(gate, rng), nearly_equal_weights(up, rng)
    return cancelling_rows(x), replace(gate, scales=gate.scales / 2**14), up


@int4_swiglu.hard_case("unlike_groups")
def _(args: tuple, rng: torch.Generator) -> tuple:
    x, gate, up = args
    x, weights = unlike_groups(x, gate, up)
    return x, *weights


@int4_swiglu.hard_case("extreme_gates")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Gates of about 1000 or -1000, whose exponentials float32 does not hold."""
    x, gate, up = args
    return (1 + x.abs()) * (1000 / x.shape[1]), nearly_equal_weights(gate, rng), replace(up, scales=up.scales / 2**8)


int4_swiglu.hard_case("zero_rows")(zero_rows)


int4_swiglu.fake_impl(lambda x, gate, up: x.new_empty(*x.shape[:-1], gate.shape[0]))


@int4_swiglu.sizes_from_args("m")
def _(x, gate, up):
    n, k = gate.shape
    m = x.shape[:-1].numel()
    return dict(m=m, n=n, G=k // gate.group_size, group=gate.group_size, dtype=dtype_name(x.dtype), order=gate.rounding)


@int4_swiglu.flops_and_bytes
def _(m, n, G, group, dtype, order):
    k, size = G * group, getattr(torch, dtype).itemsize
    return 4 * m * n * k, n * k + (4 * n * G + m * k + m * n) * size
