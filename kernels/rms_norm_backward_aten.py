"""The gradients of x · r · weight, r = 1 / sqrt(mean(x²) + eps), by torch: five passes and one new tensor of x's size.

With c = sum(grad_out · x · weight) of a row, grad_x = grad_out · weight · r - x · c · r³ / e, and grad_weight is the
product of (grad_out · x)ᵀ with r. New memory costs more than arithmetic on a CPU, so what each pass makes lies where
the one before did.
"""

import torch
from torch import Tensor

from vila_triton.ops import rms_norm_backward
from vila_triton.ops.dtypes import upcast


@rms_norm_backward.impl("aten")
def rms_norm_backward_aten(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (grad_x [..., e], grad_weight [e]) in the dtypes of x and weight."""
    e = len(weight)
    rows, grads, w = upcast(x).reshape(-1, e), upcast(grad_out).reshape(-1, e), upcast(weight).to(upcast(x[:0]).dtype)
    work = rows.square()
    r = torch.rsqrt(work.mean(-1) + eps)
    torch.mul(grads, rows, out=work)
    grad_weight = torch.mv(work.t(), r)
    c = torch.mv(work, w) * r * r * r / e  # in this order: r³ alone may be too small for float32
    grad_x = torch.mul(grads, w, out=work).mul_(r[:, None]).addcmul_(rows, c[:, None], value=-1)
    return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype)
