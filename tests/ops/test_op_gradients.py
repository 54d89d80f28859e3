"""The gradients of every op, by every implementation of it and of its backward pass, beside float64 autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.correctness.error_budget import DEVICE, error_budget, error_over_budget
from bench.correctness.guarded_memory import map_tensors
from vila_triton import ops
from vila_triton.ops import without_context
from vila_triton.registry import OPS, OneOf, Op, Unsupported, count_calls, discover, use

discover()
LEARNING = [op for op in OPS.values() if op.differentiable]
EACH = pytest.mark.parametrize("op", LEARNING, ids=lambda op: op.name)


def example(op: Op) -> tuple:
    usual = {n: d.values[0] if isinstance(d, OneOf) else max(d.low, min(d.high, 5)) for n, d in op.domain.items()}
    args = op.make_example(**usual, rng=torch.Generator().manual_seed(0), device=DEVICE)
    if op is ops.prefill_attention:  # of which only the case without pages to read from has a gradient
        args = (*args[:3], *without_context(args[1], args[4].query_start_loc), *args[5:])
    return args


def learning(op: Op, args: tuple) -> list[str]:
    """The arguments of a call that have a gradient."""
    given = op.bind(args, {})
    tensors = [n for n in op.differentiable if isinstance(given[n], Tensor)]
    return [n for n in tensors if given[n].is_floating_point()]


def gradients(op: Op, fn: Any, grad_out: Tensor, args: tuple, names: list[str]) -> list[Tensor]:
    """The gradients of `names` through fn, the op or its reference."""
    given = op.bind(args, {})
    leaves = [given[name].detach().requires_grad_() for name in names]
    with torch.enable_grad():
        out = fn(*{**given, **dict(zip(names, leaves))}.values())
        assert out.requires_grad
    return list(torch.autograd.grad(out, leaves, grad_out.to(out.dtype)))


def backward_of(op: Op, names: list[str]) -> Op:
    """An op of (grad_out, *arguments) whose reference is torch's autograd through the reference."""

    def backward(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(gradients(op, op.reference, grad_out, args, names))

    return Op(backward, False)


@EACH
def test_gradients_by_every_implementation_are_within_the_budget(op: Op) -> None:
    """The budget of a whole gradient, since 0 as a difference of rounded numbers is none of torch's formulas; elements
    have theirs in the property tests of the backward ops.
    """
    args = example(op)
    names = learning(op, args)
    grad_out = torch.randn_like(op.reference(*args))
    wants, budgets = error_budget(backward_of(op, names), (grad_out, *args))
    backward = OPS.get(f"{op.name}_backward")
    choices = [{op.name: impl} for impl in op.impls]
    choices += [{backward.name: impl} for impl in backward.impls] if backward else []
    for choice in choices:
        ((chosen, impl),) = choice.items()
        try:
            with use(**choice), count_calls() as calls:
                got = gradients(op, op, grad_out, map_tensors(torch.clone, args), names)
        except Unsupported as reason:
            print(f"{chosen:28} {impl:12} {reason}")
            continue
        assert calls[chosen, impl], choice
        compared = zip(got, wants, budgets, strict=True)
        worst = [error_over_budget(x, want, budget.amax()).amax().item() for x, want, budget in compared]
        print(f"{chosen:28} {impl:12} {', '.join(f'{n} {x:.2f}' for n, x in zip(names, worst))} of the budget")
        assert max(worst) <= 1, choice


@EACH
def test_the_gradient_of_one_argument_is_the_same_alone(op: Op) -> None:
    args = example(op)
    names = learning(op, args)
    grad_out = torch.randn_like(op.reference(*args))
    for name, want in zip(names, gradients(op, op, grad_out, args, names), strict=True):
        torch.testing.assert_close(gradients(op, op, grad_out, args, [name]), [want])


@pytest.mark.parametrize("name", ["linear", "rms_norm", "layer_norm", "swiglu", "rope", "int4_matmul", "int4_swiglu"])
def test_no_rows_have_gradients_too(name: str) -> None:
    op = OPS[name]
    rows = {"x", "gate", "up", "cos", "sin", "residual"} - ({"gate", "up"} if name == "int4_swiglu" else set())
    given = op.bind(example(op), {})
    args = tuple(x[:0] if n in rows and x is not None else x for n, x in given.items())
    names = learning(op, args)
    for name, grad in zip(names, gradients(op, op, op(*args), args, names)):
        assert grad.shape == op.bind(args, {})[name].shape and not grad.any()


@pytest.mark.parametrize("name", ["linear", "rms_norm", "layer_norm", "int4_matmul", "int4_swiglu"])
def test_a_row_alone_has_the_gradients_of_a_matrix_of_one_row(name: str) -> None:
    op = OPS[name]
    args = tuple(x[:1] if n in ("x", "residual") and x is not None else x for n, x in op.bind(example(op), {}).items())
    row = tuple(x[0] if n in ("x", "residual") and x is not None else x for n, x in op.bind(args, {}).items())
    names, grad_out = learning(op, args), torch.randn_like(op(*args))
    with use(**dict.fromkeys(OPS, "reference")):
        wants, found = gradients(op, op, grad_out, args, names), gradients(op, op, grad_out[0], row, names)
    for name, want, got in zip(names, wants, found, strict=True):
        torch.testing.assert_close(got, want.view_as(op.bind(row, {})[name]))


@EACH
def test_references_pass_gradcheck(op: Op) -> None:
    args = map_tensors(lambda x: x.double() if x.is_floating_point() else x, example(op))
    given, names = op.bind(args, {}), learning(op, args)
    leaves = [given[name].requires_grad_() for name in names]

    def through_the_op(*values: Tensor) -> Any:
        return op(*{**given, **dict(zip(names, values))}.values())

    def through_the_reference(*values: Tensor) -> Any:
        return op.reference(*{**given, **dict(zip(names, values))}.values())

    with use(**dict.fromkeys(OPS, "reference")):
        assert torch.autograd.gradcheck(through_the_op, leaves, fast_mode=True)
        assert torch.autograd.gradcheck(through_the_reference, leaves, fast_mode=True)
