"""The gradient of int4 products, of every implementation: like that of the dequantized weight, at the edges of what it
takes, and with bugs planted in kernels.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutants import Edit, Plant, by_rule, exchange, insert, plant  # noqa: F401 (plant: a fixture)
from test_int4_contract import leaf, nothing_launched
from torch import Tensor

from bench.correctness.error_budget import assert_matches_reference, example_args
from bench.correctness.find_failure import find_failure
from vila_triton import ops
from vila_triton.ops import Int4, dequantize, int4_matmul_backward
from vila_triton.registry import OPS, Impl, Op, Unsupported, count_calls, discover, use

discover()
BACKWARD: list = [pytest.param(impl, id=impl.name) for impl in int4_matmul_backward.impls.values()]
EACH_IMPL = pytest.mark.parametrize("impl", BACKWARD)


def drawn(**sizes: Any) -> tuple[Tensor, Int4]:
    """grad_out [2, 16] and w [16, 128]."""
    usual = {"m": 2, "n": 16, "G": 2, "group": 64, "dtype": "float16", "order": "sub", "seed": 0}
    return example_args(int4_matmul_backward, **{**usual, **sizes})


REFUSED = [
    (0, lambda g: g[:, :15], r"w.scales has shape \[2, 16\], expected \[G, n=15\]"),
    (0, lambda g: g.int(), "grad_out is torch.int32, expected a floating-point dtype"),
    (0, lambda g: g.to("meta"), "w.scales is on .*, expected meta like the first argument"),
    (1, lambda w: dequantize(w, torch.float16), "w is a Tensor, expected an Int4"),
    (1, leaf(group_size=12), "k = 24 and group_size = 12"),
    (1, leaf(rounding="other"), "w.rounding is 'other', expected one of sub, fma"),
    (1, leaf(qweight=lambda q: q.flatten()), r"w.qweight has shape \[256\], expected \[1, 2, 32, 4\]"),
    (1, leaf(qweight=lambda q: q.to("meta")), "w.qweight is on meta, expected .* like grad_out"),
    (1, leaf(zeros=lambda z: z[:, 1:]), r"w.zeros has shape \[2, 15\], expected \[G=2, n=16\]"),
]


@pytest.mark.parametrize("place, change, message", REFUSED, ids=[case[2] for case in REFUSED])
def test_invalid_arguments_are_refused(place: int, change: Callable[[Any], Any], message: str) -> None:
    args: list[Any] = [*drawn()]
    args[place] = change(args[place])
    for name in int4_matmul_backward.impls:
        chosen, refused = use(int4_matmul_backward=name), pytest.raises(ValueError, match=message)
        with chosen, count_calls() as ran, nothing_launched(), refused:
            int4_matmul_backward(*args)
        assert not ran


@EACH_IMPL
@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (2, 1)], ids=str)
def test_gradients_of_any_leading_axes_give_their_shape(impl: Impl, shape: tuple[int, ...]) -> None:
    grad_out, w = drawn()
    with use(int4_matmul_backward=impl.name):
        want, found = int4_matmul_backward(grad_out[:1], w), int4_matmul_backward(grad_out[0].expand(*shape, -1), w)
    assert found.shape == (*shape, 128) and found.dtype == grad_out.dtype
    torch.testing.assert_close(found, want[0].expand(*shape, -1))


@EACH_IMPL
@pytest.mark.parametrize("group, G", [(128, 5), (192, 2), (32, 3), (320, 1), (80, 1), (48, 3), (80, 2)])
def test_groups_of_every_kind(impl: Impl, group: int, G: int) -> None:
    """Whole tiles, halves, all of k, and those that cut tiles: right, or refused before a launch."""
    args = drawn(m=3, n=40, G=G, group=group, order="fma")
    if impl.name == "triton" and group % 32 and G > 1:
        with nothing_launched(), pytest.raises(Unsupported, match=f"the group is {group}, but 32, multiples of 64"):
            impl(*args)
        return
    for config in impl.configs:
        assert_matches_reference(int4_matmul_backward, impl, config, args)


@EACH_IMPL
@pytest.mark.parametrize("rounding", ["sub", "fma"])
def test_every_weight_is_rounded_as_int4_rounding_says(impl: Impl, rounding: str) -> None:
    """Gradients of 1 at one output each give the weights themselves."""
    _, w = drawn(n=80, G=3, order=rounding)
    assert torch.equal(impl(torch.eye(80, dtype=torch.float16), w), dequantize(w, torch.float16))


@EACH_IMPL
def test_scales_of_another_dtype_are_rounded_to_that_of_the_gradient(impl: Impl) -> None:
    grad_out, w = drawn()
    wide: Any = leaf(scales=Tensor.float, zeros=Tensor.float)(w)
    assert torch.equal(impl(grad_out, wide), impl(grad_out, w))


@EACH_IMPL
def test_a_weight_without_rows_gives_zeros(impl: Impl) -> None:
    found = impl(*drawn(n=0))
    assert found.shape == (2, 128) and not found.any()


INT4 = [("reference", "reference"), ("packed", "triton"), ("blocked", "blocked"), ("bags", "blocked")]


@pytest.mark.parametrize("forward, backward", INT4)
@pytest.mark.parametrize("rounding", ["sub", "fma"])
def test_gradients_are_those_of_the_dequantized_weight(forward: str, backward: str, rounding: Any) -> None:
    """Of `linear` with an int4 weight, and of `int4_swiglu`, in float32, all but the last bits."""
    _, gate = drawn(n=48, dtype="float32", order=rounding)
    _, up = drawn(n=48, dtype="float32", order=rounding, seed=1)
    rng = torch.Generator().manual_seed(0)
    x, bias, residual = (torch.randn(*s, generator=rng).requires_grad_() for s in ((2, 3, 128), (48,), (2, 3, 48)))
    plain = [dequantize(w, torch.float64) for w in (gate, up)]
    inputs = tuple(y.detach().double().requires_grad_() for y in (x, bias, residual))
    a, b = (inputs[0] @ w.t() for w in plain)
    wanted = (a + inputs[1] + inputs[2], torch.nn.functional.silu(a / 16) * b)
    choices = {"int4_matmul": forward, "int4_matmul_backward": backward, "int4_swiglu": "reference"}
    choices |= {"swiglu": "reference", "swiglu_backward": "triton" if backward == "triton" else "reference"}
    with use(**choices), count_calls() as ran:
        small: Any = leaf(scales=lambda s: s / 16)(gate)
        found = (ops.linear(x, gate, bias, residual), ops.int4_swiglu(x, small, up))
    grads = [torch.randn(2, 3, 48, generator=rng) for _ in found]
    for out, want, grad in zip(found, wanted, grads):
        used = (x, bias, residual) if out is found[0] else (x,)
        got = torch.autograd.grad(out, used, grad)
        expected = torch.autograd.grad(want, inputs[: len(used)], grad.double(), retain_graph=True)
        for y, z in zip(got, expected):
            torch.testing.assert_close(y.double(), z, rtol=1e-4, atol=1e-4 * float(z.abs().max()))
    assert ran["int4_matmul_backward", backward] == 3


@pytest.mark.parametrize("field", ["scales", "zeros"])
def test_scales_and_zeros_have_no_gradient(field: str) -> None:
    _, w = drawn()
    x = torch.randn(2, 128, dtype=torch.float16, requires_grad=True)
    trained: Any = leaf(**{field: lambda y: y.clone().requires_grad_()})(w)
    calls: list[tuple[Op, tuple[Any, ...]]] = [
        (ops.linear, (x, trained)),
        (ops.int4_matmul, (x, trained)),
        (ops.int4_swiglu, (x, w, trained)),
    ]
    for op, args in calls:
        with count_calls() as ran, pytest.raises(RuntimeError, match=r"\w+: (w|up) requires a gradient, but only"):
            op(*args)
        assert not ran


KERNEL = "_int4_matmul_backward_kernel"
NORM = "_rms_norm_backward_kernel"
GLU = "_swiglu_backward_kernel"
BUGS: dict[str, tuple[str, Edit]] = {
    "the first tile of rows at every step": (
        "int4_matmul_backward",
        exchange("step", "0", call="block_pointers"),
    ),
    "gradients of the first rows at every step": (
        "int4_matmul_backward",
        exchange("step * BLOCK_N", "0", function=KERNEL),
    ),
    "gradients past n not masked": (
        "int4_matmul_backward",
        exchange("offs_n < N if MASK_N else None", "offs_n < N + BLOCK_N if MASK_N else None", function=KERNEL),
    ),
    "the mask of columns forgotten": ("int4_matmul_backward", by_rule("drop a mask", "offs_k < K", function=KERNEL)),
    "scales and zeros of the first group": ("int4_matmul_backward", exchange("start", "0", call="load_group")),
    "sums in half precision": ("int4_matmul_backward", by_rule("dtype of a sum", "tl.dot", function=KERNEL)),
    "the product of means not divided by the width": (
        "rms_norm_backward",
        exchange("products[:, None] * rstd / E", "products[:, None] * rstd", function=NORM),
    ),
    "the second term of grad_x dropped": (
        "rms_norm_backward",
        exchange("grad * weight - y * mean", "grad * weight", function=NORM),
    ),
    "rstd applied twice": ("rms_norm_backward", exchange("y", "y * rstd", call="tl.fma")),
    "the rows of one program summed": (
        "rms_norm_backward",
        insert("num_parts = 1", after="parts = ", function="rms_norm_backward_triton"),
    ),
    "the scale of the weight twice": (
        "rms_norm_backward",
        exchange("grad * weight - y * mean", "grad * weight - y * mean * weight", function=NORM),
    ),
    "sigmoid on one side of 0 only": (
        "swiglu_backward",
        exchange("tl.where(gate >= 0, 1.0, power)", "1.0", function=GLU),
    ),
    "the gradient of the gate without its sigmoid": (
        "swiglu_backward",
        exchange("1.0 + gate * rest", "1.0", function=GLU),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a kernel that reads past a row computes with garbage
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug: str, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("bench.correctness.find_failure.SHRINK_SECONDS", 0.0)
    name, edit = BUGS[bug]
    op = OPS[name]
    plant(name, "mutant", edit)
    discover()
    mutant = op.impls["mutant"]
    assert find_failure(op, mutant, mutant.configs[-1], 40, 20.0).simplest
