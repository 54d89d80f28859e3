"""Linear layers, norms and SwiGLU one row after the other, so that a row is the same computation wherever it stands.

torch's product of matrices adds up as suits the number of rows, and its `silu` on a CPU takes another `exp` for what is
left of a vector at the end. Here every row is a call of the same shape, on memory of its own. It is what the numerics
"batch_invariant" runs on a CPU: slow for many rows, since each reads the whole weight.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Int4, dequantize, int4_matmul, int4_swiglu, linear, rms_norm, swiglu
from vila_triton.ops.dtypes import upcast


def map_rows(fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Stack fn of the first rows of all tensors [..., k], of the second rows, and so on: [..., n]."""
    shape = tensors[0].shape[:-1]
    matrices = [x.reshape(shape.numel(), x.shape[-1]) for x in tensors]  # [m, k]
    rows = list(zip(*(x.split(1) for x in matrices), strict=True)) if shape.numel() else [matrices]
    out = torch.cat([fn(*(x.clone() for x in row)) for row in rows])
    return out.view(*shape, out.shape[-1])


@linear.impl("rowwise", batch_invariant=True)
def linear_rowwise(x: Tensor, w: Tensor | Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n], a product of its own for each row; an int4 weight goes to the op
    `int4_matmul`.
    """
    if isinstance(w, Int4):  # which has an op of its own
        return linear.reference(x, w, bias, residual)
    terms = () if residual is None else (residual,)
    return map_rows(lambda row, *term: linear.reference(row, w, bias, *term), x, *terms)


@int4_matmul.impl("rowwise", batch_invariant=True)
def int4_matmul_rowwise(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n], with the weight dequantized once and a product of its own for each
    row.
    """
    weight, upcast_bias = upcast(dequantize(w, x.dtype)), None if bias is None else upcast(bias)

    def multiply(row: Tensor, *term: Tensor) -> Tensor:
        return sum(map(upcast, term), F.linear(upcast(row), weight, upcast_bias)).to(x.dtype)

    return map_rows(multiply, x, *(() if residual is None else (residual,)))


@int4_swiglu.impl("rowwise", batch_invariant=True)
def int4_swiglu_rowwise(x: Tensor, gate: Int4, up: Int4) -> Tensor:
    """Return silu(x · gateᵀ) · (x · upᵀ) [..., n], computed row by row."""
    return swiglu_rowwise(int4_matmul_rowwise(x, gate), int4_matmul_rowwise(x, up))


@rms_norm.impl("rowwise", batch_invariant=True)
def rms_norm_rowwise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the reference's norm of x [..., e], computed row by row."""
    return map_rows(lambda row: rms_norm.reference(row, weight, eps), x)


@swiglu.impl("rowwise", batch_invariant=True)
def swiglu_rowwise(gate: Tensor, up: Tensor) -> Tensor:
    """Return the reference's silu(gate) · up [..., f], computed row by row."""
    return map_rows(swiglu.reference, gate, up)
