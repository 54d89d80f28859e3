"""x · wᵀ by torch's matrix product, the weight unpacked in blocks of rows that stay in the CPU's cache.

A block of w, BLOCK_N rows of k columns, is unpacked, multiplied while it is in the cache, and forgotten, so that the
whole weight never stands in memory. It is rounded as in the reference, and every shape and dtype is served.

qweight [n, k/8] int32 is read as bytes, low nibble first: byte j of a row holds columns 2j and 2j + 1.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.domain import wide
from vila_triton.registry import Unsupported

CONFIGS = [{"BLOCK_N": 128}, {"BLOCK_N": 32}, {"BLOCK_N": 512}]


@int4_matmul.impl("blocked", configs=CONFIGS)
def int4_matmul_blocked(x: Tensor, w: Int4, *, BLOCK_N: int) -> Tensor:
    if sys.byteorder != "little":
        raise Unsupported("int4_matmul: the bytes of a word are read low byte first, which this machine does not do")
    rows = x.reshape(-1, x.shape[-1])  # [m, k]
    # A CPU multiplies all dtypes as they are but float16, which is quicker converted.
    widen = wide if x.dtype == torch.float16 else lambda y: y
    out = x.new_empty(len(rows), w.shape[0])
    x = widen(rows)
    for start in range(0, w.shape[0], BLOCK_N):
        block = slice(start, start + BLOCK_N)
        packed = w.qweight[block].contiguous().view(torch.uint8)  # [n', k/2]
        scales, zeros = (y[block, :, None].to(out.dtype) for y in (w.scales, w.zeros))  # [n', G, 1]
        codes = torch.stack((packed & 0xF, packed >> 4), -1)  # [n', k/2, 2]
        weight = codes.view(len(scales), -1, w.group).to(out.dtype).sub_(zeros).mul_(scales)  # [n', G, group]
        out[:, block] = F.linear(x, widen(weight.flatten(1)))
    return out.view(*x.shape[:-1], -1)
