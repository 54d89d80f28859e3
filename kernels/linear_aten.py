"""x · wᵀ + bias + residual by the fastest matrix product of torch for the dtype on a CPU, as measured on AMD CPUs.

float32    oneDNN's; `F.linear` runs MKL's, which takes half as long again for many rows
float16    `F.linear` for few rows; it is slow for many rows, which are multiplied in float32
bfloat16   `F.linear`, which runs oneDNN's. That takes twice as long for one row as torch's own product, so oneDNN is
           disabled for one row (in the whole process: a product in another thread may be slower, but not wrong)
others     `F.linear`; also where a gradient is needed, which oneDNN's product does not have
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.backends import mkldnn  # which is what torch calls oneDNN

from vila_triton.lock import SharedContext
from vila_triton.ops import Int4, linear
from vila_triton.registry import Unsupported

MANY_ROWS = 8  # from here on converting a float16 weight costs less than multiplying by it


@contextmanager
def without_onednn() -> Iterator[None]:
    """Disable oneDNN in the whole process for the length of a block."""
    was_enabled = mkldnn.enabled
    mkldnn.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        mkldnn.enabled = was_enabled  # pyright: ignore[reportAttributeAccessIssue]


ONEDNN_OFF = SharedContext(without_onednn)


@linear.impl("aten")
def linear_aten(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n] in x's dtype; raises Unsupported off the CPU and without oneDNN."""
    if x.device.type != "cpu" or not mkldnn.is_available():
        raise Unsupported(f"linear: this product is oneDNN's for CPUs, which this torch lacks on {x.device}")
    if isinstance(w, Int4):  # which has an op of its own
        return linear.reference(x, w, bias, residual)
    rows = x.shape[:-1].numel()
    needs_grad = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, w, bias, residual))
    if not needs_grad and (x.dtype == torch.float32 or (x.dtype == torch.float16 and rows >= MANY_ROWS)):
        # oneDNN reads a bias and a residual as if they had no strides.
        bias, residual = (None if term is None else term.float().contiguous() for term in (bias, residual))
        product = torch.ops.mkldnn._linear_pointwise
        if residual is None:
            return product(x.float(), w.float(), bias, "none", [], "").to(x.dtype)
        return product.binary(x.float(), residual, w.float(), bias, "add").to(x.dtype)
    if not needs_grad and x.dtype == torch.bfloat16 and rows == 1:
        with ONEDNN_OFF:
            return linear.reference(x, w, bias, residual)
    return linear.reference(x, w, bias, residual)
