"""References of backward ops are what torch's autograd makes of the forward op's reference, in float64.

The second half of each test makes the same gradients by `backward()`: the rule of the forward op.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from bench.correctness.error_budget import example_args, example_strategy
from bench.correctness.guarded_memory import map_tensors
from vila_triton import ops
from vila_triton.ops import without_context
from vila_triton.registry import OPS, OneOf, count_calls, use

D = torch.float64
SIZES = {"b": 1, "s": 5, "g": 1, "ratio": 2, "d": 16, "dtype": "float32"}


def prefill_args(grad_out, q, k, v, out, lse, query_start_loc, scale) -> tuple:
    return q, k, v, *without_context(k, query_start_loc), scale


FORWARD_ARGS: dict[str, Callable[..., tuple]] = {
    "rms_norm": lambda grad_out, *args: args,
    "swiglu": lambda grad_out, *args: args,
    "encoder_attention": lambda grad_out, q, k, v, out, lse, scale: (q, k, v, scale),
    "prefill_attention": prefill_args,
}


def in_float64(args: Any) -> Any:
    return map_tensors(lambda x: x.double() if x.is_floating_point() else x, args)


def leaves(args: tuple) -> list[Tensor]:
    """The arguments that have a gradient, which is asked for from now on."""
    return [x.requires_grad_() for x in args if isinstance(x, Tensor) and x.is_floating_point()]


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * max(1.0, float(y.abs().amax()) if y.numel() else 0))


@pytest.mark.parametrize("name", FORWARD_ARGS)
def test_gradients_are_those_of_the_forward_reference(name: str) -> None:
    forward, backward = OPS[name], OPS[f"{name}_backward"]

    @given(sizes=example_strategy(backward))
    def check(sizes: dict) -> None:
        for values in ("random", *backward.hard_cases):
            args = in_float64(example_args(backward, **sizes, values=values))
            forward_args = map_tensors(torch.clone, FORWARD_ARGS[name](*args))
            inputs = leaves(forward_args)
            out = forward.reference(*forward_args)
            expected = torch.autograd.grad(out, inputs, args[0])
            if "attention" in name:  # what the example holds was computed in another dtype
                out, lse = forward.reference(*map_tensors(torch.detach, forward_args), return_lse=True)
                args = (*args[:4], out, lse, *args[6:])
            assert_close(backward.reference(*args), expected)
            with use(**{name: "reference", f"{name}_backward": "reference"}):
                assert_close(torch.autograd.grad(forward(*forward_args), inputs, args[0]), expected)

    check()


@given(sizes=example_strategy(OPS["layer_norm"]))
def test_gradients_of_layer_norm(sizes: dict) -> None:
    for values in ("random", *ops.layer_norm.hard_cases):
        args = in_float64(example_args(ops.layer_norm, **sizes, values=values))
        inputs, grad_out = leaves(args), torch.randn(args[0].shape, dtype=D)
        expected = torch.autograd.grad(ops.layer_norm.reference(*args), inputs, grad_out)
        assert_close(torch.autograd.grad(ops.layer_norm(*args), inputs, grad_out), expected)


@given(sizes=example_strategy(OPS["int4_matmul_backward"]))
def test_gradients_of_int4_products(sizes: dict) -> None:
    grad_out, w = in_float64(example_args(OPS["int4_matmul_backward"], **sizes))
    m, (n, k) = len(grad_out), w.shape
    rng = torch.Generator().manual_seed(sizes["seed"])
    x, bias, residual = (torch.randn(*s, dtype=D, generator=rng).requires_grad_() for s in ((m, k), (n,), (m, n)))
    inputs = x, bias, residual
    expected = torch.autograd.grad(ops.int4_matmul.reference(x, w, bias, residual), inputs, grad_out)
    assert_close((ops.int4_matmul_backward.reference(grad_out, w),), expected[:1])
    with use(int4_matmul="reference", int4_matmul_backward="reference", int4_swiglu="reference"):
        assert_close(torch.autograd.grad(ops.int4_matmul(x, w, bias, residual), inputs, grad_out), expected)
        expected = torch.autograd.grad(ops.int4_swiglu.reference(x, w, w), x, grad_out)
        assert_close(torch.autograd.grad(ops.int4_swiglu(x, w, w), x, grad_out), expected)


def test_what_is_read_from_pages_has_no_gradient() -> None:
    q, k, v, cache, batch, scale = example_args(OPS["prefill_attention"], 0, **SIZES, t=3, l=16)
    out = ops.prefill_attention(q.requires_grad_(), k, v, cache, batch, scale)
    with pytest.raises(RuntimeError, match=r"prefill_attention: .* read from pages have no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("name", [*FORWARD_ARGS, "int4_matmul"])
def test_a_second_derivative_is_refused(name: str) -> None:
    backward = OPS[f"{name}_backward"]
    sizes = {axis: values.values[0] if isinstance(values, OneOf) else 8 for axis, values in backward.domain.items()}
    args = example_args(backward, 0, **sizes)
    with count_calls() as calls, pytest.raises(RuntimeError, match=r"grad_out requires a gradient, but .* no second"):
        backward(args[0].requires_grad_(), *args[1:])
    assert not calls


def test_nothing_at_all_has_gradients_of_nothing() -> None:
    """No images, no sequences, sequences without tokens, and no rows."""
    q = torch.ones(0, 5, 2, 16, requires_grad=True)
    ops.encoder_attention(q, q, q, 1.0).sum().backward()
    x = torch.ones(0, 2, 16, requires_grad=True)
    for starts in ([0], [0, 0, 0]):
        rest = without_context(x, torch.tensor(starts).int())
        ops.prefill_attention(x, x, x, *rest, 1.0).sum().backward()
    row = torch.ones(16, requires_grad=True)
    ops.rms_norm(x[:, 0], row, 1e-5).sum().backward()
    ops.swiglu(x[:, 0], x[:, 1]).sum().backward()
    assert q.grad is not None and x.grad is not None and row.grad is not None and not row.grad.any()
