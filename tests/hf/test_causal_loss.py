"""The loss of labels and its gradient are those of torch's cross-entropy, and nothing of the logits' size is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.hf import causal_loss as module
from vila_triton.hf.causal_loss import causal_loss
from vila_triton.models.vila import IGNORE_INDEX

VOCAB = 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3 * VOCAB + 1)


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Logits of three sequences, one of a single token, with labels some of which are ignored."""
    rng = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, VOCAB, (n,), generator=rng) for n in (7, 1, 4)]
    labels[0][2:4] = IGNORE_INDEX
    return (torch.randn(12, VOCAB, generator=rng) * 20).to(dtype).requires_grad_(), labels


def expected_loss(logits: Tensor, labels: list[Tensor]) -> Tensor:
    rows = logits.split([len(x) for x in labels])
    return F.cross_entropy(torch.cat([x[:-1] for x in rows]), torch.cat([x[1:] for x in labels]))


def test_loss_and_gradient_are_those_of_torch() -> None:
    logits, labels = case()
    loss, expected = causal_loss(logits, labels), expected_loss(logits, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    (grad,), (expected_grad,) = (torch.autograd.grad(3 * x, logits) for x in (loss, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-16)
    assert torch.autograd.gradcheck(lambda x: causal_loss(x, labels, 5), logits)
    torch.testing.assert_close(causal_loss(logits, labels, torch.tensor(5)), expected * 7 / 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    logits, labels = case(dtype)
    exact = logits.detach().double().requires_grad_()
    loss, expected = causal_loss(logits, labels), expected_loss(exact, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (grad,), (expected_grad,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-7)


def test_backward_pass_keeps_the_logits_themselves_and_numbers_a_row() -> None:
    logits, labels = case(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = causal_loss(logits, labels)
    assert {x.data_ptr() for x in kept if x.numel() > len(logits)} == {logits.data_ptr()}
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="the loss has no second derivative"):
        grad.sum().backward()
