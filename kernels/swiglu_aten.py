"""silu(gate) · up by torch's `silu`, multiplied in place, which saves a temporary and copies in float32.

In half precision the product is computed in float32 and rounded once. Rounding silu first, as Hugging Face's LLaMA
does, exceeds the error budget where silu is subnormal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import swiglu


@swiglu.impl("aten")
def swiglu_aten(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up in gate's shape and dtype."""
    if gate.dtype in (torch.float32, torch.float64):
        return F.silu(gate).mul_(up)
    return F.silu(gate.float()).mul_(up).to(gate.dtype)
