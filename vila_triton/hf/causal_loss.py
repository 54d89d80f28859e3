"""The cross-entropy of labels, of which nothing but the logits is kept for the backward pass.

torch's keeps the log-softmax in float32 too, and makes two more tensors of that size on the way back: for a vocabulary
of 32,000 far more than a layer keeps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.vila import IGNORE_INDEX
from ..registry.gradients import first_derivative_only

CHUNK = 2**21  # numbers of the logits that are in float32 at once


def causal_loss(logits: Tensor, labels: Sequence[Tensor], num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """Mean cross-entropy of every label but the first of its sequence, under the logits one position before it: [s, v]
    of all sequences end to end, labels [t] of each -> float32, or float64 of such logits.

    num_items_in_batch: what the sum is divided by instead of the number of these labels, where several batches make one
    step.
    """
    targets = torch.cat([torch.cat((row[1:], row.new_full((1,), IGNORE_INDEX))) for row in labels]).to(logits.device)
    total: Any = CrossEntropySum.apply(logits, targets)
    return total / ((targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


def chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of logits [s, v] and of others [s, ...] that lie in the same chunk."""
    rows = max(1, CHUNK // logits.shape[1])
    yield from zip(*(x.split(rows) for x in (logits, *others)))


class CrossEntropySum(torch.autograd.Function):
    """The sum over rows of log Σ exp(logits) - logits[target]; logits [s, v], targets [s], where not `IGNORE_INDEX`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.cat([torch.logsumexp(x.to(dtype), -1) for (x,) in chunks(logits)])  # [s]
        ctx.save_for_backward(logits, targets, lse)
        at_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return (lse - at_target).masked_fill(targets == IGNORE_INDEX, 0).sum()

    @staticmethod
    @first_derivative_only(lambda ctx: "the loss")
    def backward(ctx: Any, *grads: Tensor) -> tuple[tuple[Tensor, None], tuple[Tensor, ...]]:
        logits, targets, lse = ctx.saved_tensors
        weights = grads[0].expand_as(lse).masked_fill(targets == IGNORE_INDEX, 0)
        grad_logits = torch.empty_like(logits)
        rows = chunks(grad_logits, logits, targets.clamp(min=0)[:, None], lse[:, None], weights[:, None])
        for out, x, target, row_lse, weight in rows:
            softmax = (x - row_lse).exp_()
            softmax.scatter_add_(1, target, torch.full_like(row_lse, -1))
            torch.mul(softmax, weight, out=out)
        return (grad_logits, None), (logits,)
