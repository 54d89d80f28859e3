"""x · wᵀ by torch's own int4 product for CPUs, `aten::_weight_int4pack_mm_for_cpu`.

It computes (code - 8) · scale + shift, where shift = (8 - zero) · scale is rounded to x's dtype, and sums in float32.
It is vectorized only in bfloat16; in float32 and float16 it is a scalar loop, and `bags` is faster.

torch has a layout of its own for this, of multiples of 16 rows: rows of zeros are added. The packed copy of a weight
takes as many bytes as the weight, see `_packed_copies`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.registry import Unsupported

from ._packed_copies import packed_copy

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
GROUP_SIZES = (32, 64, 128, 256)
ROWS = 16  # of which torch packs multiples


def pack_for_aten(w: Int4, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight in torch's layout: words [n', k/2] uint8, and scale and shift [G, n', 2]; n' = n and rows of zeros."""
    pad = -w.shape[0] % ROWS
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(unpack_codes(w), (0, 0, 0, pad)), 1)
    scales = w.scales.to(dtype)
    shifts = ((8 - w.zeros.float()) * scales.float()).to(dtype)
    return words, F.pad(torch.stack((scales, shifts), -1), (0, 0, 0, pad))


@int4_matmul.impl("aten")
def int4_matmul_aten(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n]; raises Unsupported for what torch does not serve."""
    (n, k), group_size = w.shape, w.group_size
    if x.device.type != "cpu":
        raise Unsupported(f"int4_matmul: this product is torch's for CPUs, but tensors are on {x.device}")
    if x.dtype not in DTYPES:
        raise Unsupported(f"int4_matmul: {x.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if group_size not in GROUP_SIZES:
        raise Unsupported(f"int4_matmul: the group is {group_size}, but torch takes {', '.join(map(str, GROUP_SIZES))}")
    if w.rounding != "sub":
        raise Unsupported(f"int4_matmul: the rounding is {w.rounding!r}, but torch has its own formula")
    rows = x.reshape(-1, k).contiguous()  # [m, k]
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    words, scales = packed_copy(w, x.dtype, pack_for_aten)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, words, group_size, scales)  # [m, n']
    out = out[:, :n].reshape(*x.shape[:-1], n)
    for term in (bias, residual):
        out = out if term is None else out + term
    return out
