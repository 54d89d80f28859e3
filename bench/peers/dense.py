"""torch's product with the weight kept as plain numbers, as a model in 16 bits has it: cuBLAS on an NVIDIA GPU.

Nothing to install. The weight is dequantised once, rounded to x's dtype as `Int4.order` says, and that is not timed.
Its GB/s are, as those of all that are timed beside it, of the bytes of a weight in 4 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.int4 import dequantize

from ._cached_conversion import convert_once


def dequantize_weight(w: Int4, dtype: torch.dtype) -> Tensor:
    return dequantize(w, dtype)


@int4_matmul.impl("dense")
def int4_matmul_dense(x: Tensor, w: Int4, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, convert_once(dequantize_weight, w, dtype=x.dtype), bias)
