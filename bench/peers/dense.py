"""torch's product with the dequantized weight, as a model in 16 bits has it: cuBLAS on an NVIDIA GPU.

Nothing to install. The weight is dequantized once, rounded to x's dtype as `Int4.rounding` says, and that is not timed.
Its GB/s count the bytes of the weight in 4 bits, as those of all peers do.
"""

from torch import Tensor

from vila_triton.ops import Int4, int4_matmul, linear
from vila_triton.ops.int4_weight import dequantize

from ._cached_conversion import convert_once


@int4_matmul.impl("dense")
def int4_matmul_dense(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Multiplies x [..., k] by the dequantized weight [n, k] with torch, adds bias [n] and residual [..., n]; returns
    [..., n].
    """
    return linear.reference(x, convert_once(dequantize, w, dtype=x.dtype), bias, residual)
