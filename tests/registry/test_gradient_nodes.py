"""Calls of ops as nodes of torch's autograd: the choices of the forward pass hold in the backward, or it is refused."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from vila_triton import ops
from vila_triton.commands.ops import describe_gradient
from vila_triton.registry import OPS, Op, count_calls, discover, keep_choices, op, use

discover()


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]


def layer(x: Tensor, w: Tensor) -> Tensor:
    """Both the first and the last thing that keeps a tensor is torch's."""
    return F.silu(ops.linear(F.silu(x), w)).square()


def in_a_thread(fn: Callable[[], Any]) -> None:
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op of a third party, x · y, forgotten after the test."""

    def test_third(x: Tensor, y: Tensor, power: int = 1) -> Tensor:
        return x * y**power

    monkeypatch.setitem(OPS, "test_third", None)
    made = op(test_third)
    made.impl("other")(lambda x, y, power: torch.from_numpy(x.numpy() * y.numpy() ** power))  # no gradient of its own
    return made


@pytest.mark.parametrize("run", [lambda fn: fn(), in_a_thread], ids=["after", "in_another_thread"])
def test_the_backward_pass_runs_the_implementations_of_the_forward_pass(run: Callable) -> None:
    x, w = tensors((3, 8), (5, 8))
    with use(linear="reference"), count_calls() as calls:
        loss = layer(x, w).sum()
    run(loss.backward)
    assert calls == {("linear", "reference"): 3}
    assert x.grad is not None and w.grad is not None


def test_a_checkpoint_keeps_the_choices() -> None:
    x, w = tensors((3, 8), (5, 8))
    want = torch.autograd.grad(layer(x, w).sum(), (x, w))
    with use(linear="reference"), count_calls() as calls:
        loss = checkpoint(layer, x, w, use_reentrant=False, context_fn=keep_choices).sum()
    for passes in (1, 2):
        torch.testing.assert_close(torch.autograd.grad(loss, (x, w), retain_graph=True), want)
        assert calls == {("linear", "reference"): 1 + 3 * passes}


def test_a_checkpoint_that_runs_something_else_is_refused() -> None:
    x, w = tensors((3, 8), (5, 8))
    with use(linear="reference"):
        loss = checkpoint(layer, x, w, use_reentrant=False).sum()
        again = checkpoint(layer, x, w, use_reentrant=False).sum()
        reentrant = checkpoint(layer, x, w, use_reentrant=True).sum()
        again.backward()  # under the choices of the forward pass
    with pytest.raises(
        RuntimeError, match=r"linear: the forward pass ran 'reference', but a checkpoint .*keep_choices"
    ):
        loss.backward()
    with pytest.raises(RuntimeError, match="linear: a checkpoint with use_reentrant=True does not keep the choices"):
        reentrant.backward()


def test_an_op_without_a_rule_has_the_gradient_of_its_reference(third: Op) -> None:
    x, y = tensors((4,), (4,))
    with use(test_third="other"):
        loss = third(x, y, power=2).sum()
        with pytest.raises(RuntimeError, match="test_third: 'other' has no gradient of itself"):
            third.impls["other"](x, y, power=2)
    got = torch.autograd.grad(loss, (x, y))
    assert torch.equal(got[0], y**2) and torch.equal(got[1], 2 * x * y)
    assert third.differentiable == ("x", "y", "power")
    assert describe_gradient(third) == "the reference is run again, and torch differentiates it"


def test_a_reference_that_torch_cannot_differentiate_says_what_to_declare(third: Op) -> None:
    third.reference = lambda x, y, power: x.detach()
    (x,) = tensors((4,))
    with pytest.raises(RuntimeError, match=r"test_third: .* has no gradient.*test_third.no_gradient\(reason\), or @"):
        third(x, x).sum().backward()


def test_mistakes_in_a_rule_are_named(third: Op) -> None:
    with pytest.raises(TypeError, match=r"test_third.gradient: no z; there are x, y, power, out"):
        third.gradient(x="z")
    with pytest.raises(TypeError, match=r"test_third.gradient: no out; there are x, y, power"):
        third.gradient(out="x")
    with pytest.raises(TypeError, match=r"test_third.gradient: no lse"):
        third.gradient(x="lse")
    third.gradient(x="y", y="x")(lambda *, grad, needs, x, y, power: grad * y)
    x, y = tensors((4,), (4,))
    with pytest.raises(RuntimeError, match=r"test_third: .* returns \(Tensor\), expected Tensors for x, y, or None"):
        third(x, y).sum().backward()
    third.gradient(x="y", y="x")(lambda *, grad, needs, x, y, power: (grad * y, None))
    third(x, y.detach()).sum().backward()
    with pytest.raises(RuntimeError, match=r"returns \(Tensor, None\), expected .* unlike x, y"):
        third(x, y).sum().backward()


def test_only_what_gradients_need_is_kept_and_changing_it_is_an_error() -> None:
    x, w = tensors((3, 8), (5, 8))
    int4 = ops.Int4.pack(torch.randn(16, 32), 32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.linear(x, w.detach())
        ops.rope(tensors((3, 2, 8))[0], *(torch.ones(3, 4) for _ in range(2)))
        (rows,) = tensors((3, 32))
        ops.linear(rows, int4)
    shapes = [tuple(t.shape) for t in kept if t.ndim]
    assert shapes == [(5, 8), (3, 4), (3, 4), tuple(int4.qweight.shape), (1, 16), (1, 16)]
    out = ops.linear(rows, int4)
    int4.scales.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_and_forward_mode_are_refused() -> None:
    x, w = tensors((3, 8), (5, 8))
    out = ops.linear(x, w)
    for loss in (out.sum(), out.square().sum()):  # whose gradients are a constant, and none
        (grad,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="linear has no second derivative"):
            (grad.sum() + x.sum()).backward()
        with pytest.raises(RuntimeError, match="linear has no second derivative"):
            torch.autograd.grad(grad.sum() + out.sum(), w, retain_graph=True)  # runs no node that does not lead to w
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        ops.linear(forward_ad.make_dual(x, x), w)


def test_the_log_sum_exp_has_no_gradient() -> None:
    (q,) = tensors((1, 4, 2, 32))
    out, lse = ops.encoder_attention(q, q, q, 0.2, return_lse=True)
    with pytest.raises(RuntimeError, match="the log-sum-exp has no gradient"):
        torch.autograd.grad(out.sum() + lse.sum(), q)


def test_autocast_casts_the_arguments_of_products() -> None:
    x, w = tensors((3, 8), (5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out, norm = ops.linear(x, w), ops.rms_norm(x, w[0], 1e-5)
        want = torch.autograd.grad(F.linear(x, w).square().sum(), (x, w))
        got = torch.autograd.grad(out.square().sum(), (x, w))
        assert ops.linear(x.double(), w.double()).dtype == torch.float64
    assert out.dtype == torch.bfloat16 and norm.dtype == torch.float32 and got[0].dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
