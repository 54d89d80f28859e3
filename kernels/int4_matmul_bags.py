"""x · wᵀ for few rows by torch's weighted sum of rows of 4-bit codes, `quantized::embedding_bag_4bit_rowwise_offsets`.

A group of inputs is a bag: the sum of their rows of codes, each of n, weighted by x, in float32. Scale and zero point
are applied to the sums of a group, so no weight is rounded:

    sub  y = Σ scale · (Σ code · x - zero · Σ x)          over groups, and over the inputs of each
    fma  y = Σ scale · Σ code · x + shift · Σ x           shift = -zero · scale, rounded

Every dtype, group and shape is served; each row of x takes as long as the first, so this is for a few. The codes lie by
inputs, k rows of n, which is a copy of the weight as large as its codes, see `_packed_copies`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.registry import Unsupported

from ._packed_copies import packed_copy

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SUM = 0  # the mode of a bag


def pack_for_bags(w: Int4, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of codes [k, ceil(n/2) + 4] uint8, two a byte, the first in its lower half, and the bags' offsets [G].

    A row ends with the scale and the bias that torch gives it, two float16 numbers: 1 and 0.
    """
    codes = F.pad(unpack_codes(w).to(torch.uint8), (0, 0, 0, w.shape[0] % 2)).t()  # [k, n']
    ends = torch.tensor([1.0, 0.0], dtype=torch.float16).view(torch.uint8).expand(len(codes), 4)
    return torch.cat((codes[:, ::2] | (codes[:, 1::2] << 4), ends), 1), torch.arange(0, len(codes), w.group_size)


@int4_matmul.impl("bags")
def int4_matmul_bags(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n] in x's dtype; raises Unsupported off the CPU and for other dtypes."""
    if x.device.type != "cpu":
        raise Unsupported(f"int4_matmul: these sums are torch's for CPUs, but tensors are on {x.device}")
    if x.dtype not in DTYPES:
        raise Unsupported(f"int4_matmul: {x.dtype} is not one of {', '.join(map(str, DTYPES))}")
    (n, k), rows = w.shape, x.reshape(-1, x.shape[-1]).float().contiguous()  # [m, k]
    if not rows.numel() or not n:
        return x.new_empty(*x.shape[:-1], n)
    codes, offsets = packed_copy(w, x.dtype, pack_for_bags)
    inputs = torch.arange(k)
    weighted_sum = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
    sums = x.new_empty(len(rows), *w.scales.shape, dtype=torch.float32)  # [m, G, n]
    for i, row in enumerate(rows):
        sums[i] = weighted_sum(codes, inputs, offsets, False, SUM, False, row)[:, :n]
    x_sums = rows.unflatten(1, (-1, w.group_size)).sum(-1)  # [m, G]
    scales, zeros = w.scales.to(x.dtype), w.zeros.to(x.dtype)
    if w.rounding == "sub":
        out = (sums - zeros.float() * x_sums[..., None]).mul_(scales.float()).sum(1)
    else:
        out = sums.mul_(scales.float()).sum(1) - x_sums @ (zeros * scales).float()
    for term in (bias, residual):
        out = out if term is None else out + term.reshape(-1, n)
    return out.to(x.dtype).view(*x.shape[:-1], n)
