"""x · wᵀ + bias + residual by torch's matrix product, w unpacked in blocks of rows that stay in the CPU's cache.

A block of w, BLOCK_N rows of k columns, is unpacked and multiplied while it is in the cache, so that the whole weight
is never in memory. Every shape and dtype is served, gradients by the reference. Half precision is multiplied in
float32, and the weight not rounded, unless the CPU has instructions for it: then it is rounded as in the reference.

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
from vila_triton.ops.int4_tiles import TILE_K, TILE_N
from vila_triton.registry import Unsupported

from ._cpu_product import float32_product, half_product, has_instructions_for, wants_gradient

CONFIGS = [{"BLOCK_N": 512}, {"BLOCK_N": 32}, {"BLOCK_N": 128}]


def permute_to_byte_order(x: Tensor) -> Tensor:
    """[..., k] -> [..., k padded to a multiple of 64], with the columns in the order of the bytes of their codes."""
    x = F.pad(x, (0, -x.shape[-1] % TILE_K))
    return rearrange(x, "... (j word side c pair) -> ... (j c word pair side)", word=4, side=2, c=4, pair=2)


def unpack_block(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of tiles [i, j, 32, 4] int32 in the order of their bytes [i, 16, j·64] in a dtype."""
    tile_bytes = tiles.contiguous().view(torch.uint8)  # [i, j, 32, 16]
    tile_bytes = rearrange(tile_bytes, "i j (r c) byte -> i r (j c byte)", r=8).contiguous()
    codes = tile_bytes.new_empty(len(tiles), 2, *tile_bytes.shape[1:])  # [i, 2, 8, k']
    torch.bitwise_and(tile_bytes, 0xF, out=codes[:, 0])
    torch.bitwise_right_shift(tile_bytes, 4, out=codes[:, 1])
    return codes.flatten(1, 2).to(dtype)


@int4_matmul.impl("blocked", configs=CONFIGS)
def int4_matmul_blocked(
    x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None, *, BLOCK_N: int
) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n] in x's dtype; raises Unsupported on a big-endian machine."""
    if sys.byteorder != "little":
        raise Unsupported("int4_matmul: the bytes of a word are read low byte first, which this machine does not do")
    if wants_gradient(x, bias, residual, w.scales, w.zeros):
        return int4_matmul.reference(x, w, bias, residual)
    (n, k), rows = w.shape, x.reshape(-1, x.shape[-1])  # [m, k]
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    stays_half = is_half and x.device.type == "cpu" and has_instructions_for(x.dtype)
    widen = (lambda y: y) if stays_half else upcast
    product = half_product if stays_half else linear.reference if x.dtype == torch.float64 else float32_product
    inputs = widen(permute_to_byte_order(rows))
    whole_groups = w.group_size % TILE_K == 0 or w.group_size == k  # a group is then a range of columns in either order
    group_ids = permute_to_byte_order(torch.arange(k, device=x.device) // w.group_size)
    scales, zeros = (y.to(x.dtype) for y in (w.scales, w.zeros))  # [G, n]
    shifts = None if w.rounding == "sub" else upcast(-(zeros * scales))
    scales, zeros = upcast(scales), upcast(zeros)
    per_weight = (lambda y: y.t()[..., None]) if whole_groups else (lambda y: y[group_ids].t()[:, None])
    out = x.new_empty(len(rows), n)
    residual = None if residual is None else residual.reshape(out.shape)
    for start in range(0, n if len(rows) else 0, BLOCK_N):
        block = slice(start, min(start + BLOCK_N, n))
        tiles = w.qweight[start // TILE_N : -(-block.stop // TILE_N)]
        weight = unpack_block(tiles, inputs.dtype if inputs.dtype == torch.float64 else torch.float32)
        weight = weight.flatten(0, 1)[: block.stop - start]  # [n', k']

        # [n', G, k'/G] times [n', G, 1]; or [n', 1, k'] times the same where a group is no range of columns
        groups = weight.unflatten(1, (len(scales) if whole_groups else 1, -1))
        if shifts is None:
            groups.sub_(per_weight(zeros[:, block])).mul_(per_weight(scales[:, block]))
        else:
            groups.mul_(per_weight(scales[:, block])).add_(per_weight(shifts[:, block]))
        terms = (None if term is None else widen(term[..., block]) for term in (bias, residual))
        out[:, block] = product(inputs, weight.to(inputs.dtype), *terms)
    return out.view(*x.shape[:-1], n)
