"""A layer that is run anew in the backward pass has the kernels of the forward pass there, compiled or not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton import ops, use
from vila_triton.models.checkpointing import layer_runner
from vila_triton.registry import count_calls


def block(x: Tensor, w: Tensor) -> Tensor:
    return F.silu(ops.linear(F.silu(ops.linear(x, w)), w))


def loss(x: Tensor, w: Tensor) -> Tensor:
    run_layer = layer_runner(block, checkpointing=True)
    return run_layer(run_layer(x, w), w).square().sum()


def compiled(f: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "wrap", [lambda f: f, pytest.param(compiled, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_layers_run_anew_by_the_choices_of_the_forward_pass(wrap: Callable) -> None:
    rng = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(n, 8, generator=rng, dtype=torch.float64, requires_grad=True) for n in (3, 8))
    expected = torch.autograd.grad(block(block(*args), args[1]).square().sum(), args)
    run = wrap(loss)
    for impl in ("reference", "rowwise"):
        with use(linear=impl), count_calls() as calls:
            result = run(*args)
        found = torch.autograd.grad(result, args)
        assert calls == {("linear", impl): 4 + 4 + 8}  # forward, anew, and two for the gradients of each
        torch.testing.assert_close(found, expected)
