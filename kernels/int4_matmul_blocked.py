"""x · wᵀ + bias + residual by torch's matrix product, w unpacked in blocks of rows that stay in the CPU's cache.

A block of w, BLOCK_N rows of k columns, is unpacked and multiplied while it is in the cache, so that the whole weight
is never in memory. It is rounded as in the reference, and every shape and dtype is served.

The codes stay in the order of the bytes: a byte of a tile holds a code of row r in its lower nibble and one of row r +
8 in its upper one, so bytes & 15 are eight rows and bytes >> 4 the eight others. x is permuted to that order instead.
"""

import sys

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul, linear
from vila_triton.ops.dtypes import upcast
from vila_triton.ops.int4 import apply_scale_and_zero
from vila_triton.ops.int4_tiles import TILE_K, TILE_N
from vila_triton.registry import Unsupported

CONFIGS = [{"BLOCK_N": 128}, {"BLOCK_N": 32}, {"BLOCK_N": 512}]


def permute_to_byte_order(x: Tensor) -> Tensor:
    """[..., k] -> [..., k padded to a multiple of 64], with the columns in the order of the bytes of their codes."""
    x = F.pad(x, (0, -x.shape[-1] % TILE_K))
    return rearrange(x, "... (j word side c pair) -> ... (j c word pair side)", word=4, side=2, c=4, pair=2)


@int4_matmul.impl("blocked", configs=CONFIGS)
def int4_matmul_blocked(
    x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None, *, BLOCK_N: int
) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n] in x's dtype; raises Unsupported on a big-endian machine."""
    if sys.byteorder != "little":
        raise Unsupported("int4_matmul: the bytes of a word are read low byte first, which this machine does not do")
    (n, k), rows = w.shape, x.reshape(-1, x.shape[-1])  # [m, k]
    # A CPU multiplies all dtypes as they are but float16, which is quicker converted.
    widen = upcast if x.dtype == torch.float16 else lambda y: y
    inputs = widen(permute_to_byte_order(rows))
    group_ids = permute_to_byte_order(torch.arange(k, device=x.device) // w.group_size)
    whole_groups = w.group_size % TILE_K == 0 or w.group_size == k  # a group is then a range of columns in either order
    out = x.new_empty(len(rows), n)
    residual = None if residual is None else residual.reshape(out.shape)
    for start in range(0, n, BLOCK_N):
        block = slice(start, min(start + BLOCK_N, n))
        tile_bytes = w.qweight[start // TILE_N : -(-block.stop // TILE_N)].contiguous().view(torch.uint8)
        tile_bytes = rearrange(tile_bytes, "i j (r c) byte -> i r (j c byte)", r=8)
        q = (
            torch.stack((tile_bytes & 0xF, tile_bytes >> 4), 1).flatten(0, 2)[: block.stop - start].to(x.dtype)
        )  # [n', k']
        scales, zeros = (y[:, block].to(x.dtype) for y in (w.scales, w.zeros))  # [G, n']
        if whole_groups:
            q, scales, zeros = q.unflatten(1, (len(scales), -1)), scales.t()[..., None], zeros.t()[..., None]
        else:
            scales, zeros = scales[group_ids].t(), zeros[group_ids].t()
        weight = (
            q.sub_(zeros).mul_(scales) if w.rounding == "sub" else apply_scale_and_zero(q, scales, zeros, w.rounding)
        )
        terms = (None if term is None else widen(term[..., block]) for term in (bias, residual))
        out[:, block] = linear.reference(inputs, widen(weight.view(len(q), -1)), *terms).to(out.dtype)
    return out.view(*x.shape[:-1], n)
