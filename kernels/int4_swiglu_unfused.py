"""silu(x · gateᵀ) · (x · upᵀ) as two products and a SwiGLU, by the implementations of these ops that run here."""

from torch import Tensor

from vila_triton.ops import Int4, int4_matmul, int4_swiglu, swiglu


@int4_swiglu.impl("unfused")
def int4_swiglu_unfused(x: Tensor, gate: Int4, up: Int4) -> Tensor:
    """Return silu(x · gateᵀ) · (x · upᵀ) [..., n] by the ops `int4_matmul` and `swiglu`."""
    rows = x.reshape(-1, x.shape[-1])  # [m, k]
    return swiglu(int4_matmul(rows, gate), int4_matmul(rows, up)).view(*x.shape[:-1], gate.shape[0])
