"""The gradients of silu(gate) · up by torch's `silu` and `silu_backward`, in place in float32; half precision is
computed in float32 and rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import swiglu_backward
from vila_triton.ops.dtypes import upcast


@swiglu_backward.impl("aten")
def swiglu_backward_aten(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (grad_gate, grad_up) in the shape and dtype of gate."""
    grad, g = upcast(grad_out), upcast(gate)
    grad_gate = grad * upcast(up)
    torch.ops.aten.silu_backward.grad_input(grad_gate, g, grad_input=grad_gate)
    return grad_gate.to(gate.dtype), F.silu(g).mul_(grad).to(up.dtype)
