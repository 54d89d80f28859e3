"""x · wᵀ + bias + residual by the fastest product of torch for the dtype and the rows on a CPU, see `_cpu_product`.

Other dtypes than float32 and half precision go by `F.linear`.
"""

import torch
from torch import Tensor

from vila_triton.ops import Int4, linear
from vila_triton.registry import Unsupported

from ._cpu_product import float32_product, half_product

PRODUCTS = {torch.float32: float32_product, torch.float16: half_product, torch.bfloat16: half_product}


@linear.impl("aten")
def linear_aten(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n] in x's dtype; raises Unsupported off the CPU."""
    if x.device.type != "cpu":
        raise Unsupported(f"linear: these products are torch's for CPUs, but tensors are on {x.device}")
    if isinstance(w, Int4):  # which has an op of its own
        return linear.reference(x, w, bias, residual)
    num_rows = x.shape[:-1].numel()
    if not num_rows or x.dtype not in PRODUCTS:
        return linear.reference(x, w, bias, residual)
    residual = None if residual is None else residual.reshape(num_rows, -1)
    return PRODUCTS[x.dtype](x.reshape(num_rows, -1), w, bias, residual).view(*x.shape[:-1], -1)
