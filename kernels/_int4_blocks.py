"""Blocks of int4 weights as numbers on a CPU, in the order of the bytes of their codes.

A byte of a tile holds a code of row r in its lower nibble and one of row r + 8 in its upper one, so bytes & 15 are
eight rows and bytes >> 4 the eight others. Columns stay in the order of the bytes: that order is cheaper to give to x
(`permute_to_byte_order`) or to take from a result (`restore_order`) than to take from every block of codes.
"""

import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vila_triton.ops import Int4, linear
from vila_triton.ops.dtypes import upcast
from vila_triton.ops.int4_tiles import TILE_K, TILE_N
from vila_triton.registry import Unsupported

from ._cpu_product import float32_product, half_product, has_instructions_for

INPUTS, BYTES = "... (j word side c pair)", "... (j c word pair side)"  # the order of the columns of tiles
AXES = {"word": 4, "side": 2, "c": 4, "pair": 2}


def check_byte_order(op_name: str) -> None:
    """Raise Unsupported on a big-endian machine."""
    if sys.byteorder != "little":
        raise Unsupported(f"{op_name}: the bytes of a word are read low byte first, which this machine does not do")


def product_for(x: Tensor) -> Callable[..., Tensor]:
    """The product of inputs x with blocks of a weight: in half precision where the CPU has instructions for it, else
    in float32 or, for inputs of float64, in that.
    """
    if x.dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu" and has_instructions_for(x.dtype):
        return half_product
    return linear.reference if x.dtype == torch.float64 else float32_product


def whole_tiles(k: int) -> int:
    """k columns, padded to whole tiles."""
    return -(-k // TILE_K) * TILE_K


def permute_to_byte_order(x: Tensor) -> Tensor:
    """[..., k] -> [..., k padded to a multiple of 64], with the columns in the order of the bytes of their codes."""
    return rearrange(F.pad(x, (0, -x.shape[-1] % TILE_K)), f"{INPUTS} -> {BYTES}", **AXES)


def restore_order(x: Tensor) -> Tensor:
    """Columns of whole tiles in the order of the bytes of their codes -> in their own order: [..., k] -> [..., k]."""
    return rearrange(x, f"{BYTES} -> {INPUTS}", **AXES)


def unpack_block(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """Tiles [i, j, 32, 4] int32 -> their codes [i·16, j·64] in a dtype, columns in the order of the bytes."""
    tile_bytes = tiles.contiguous().view(torch.uint8)  # [i, j, 32, 16]
    tile_bytes = rearrange(tile_bytes, "i j (r c) byte -> i r (j c byte)", r=8).contiguous()
    codes = tile_bytes.new_empty(len(tiles), 2, *tile_bytes.shape[1:])  # [i, 2, 8, j·64]
    torch.bitwise_and(tile_bytes, 0xF, out=codes[:, 0])
    torch.bitwise_right_shift(tile_bytes, 4, out=codes[:, 1])
    return codes.flatten(0, 2).to(dtype)


class BlockedWeight:
    """An int4 weight of which `block` makes numbers, in float32 or, for inputs of float64, in that.

    Scales and zeros are rounded to the dtype of the inputs, as in the reference, weights are not.
    """

    def __init__(self, w: Int4, dtype: torch.dtype, block_k: int):
        """dtype: of the inputs. block_k: the columns of a block, whole tiles; the last block may have fewer."""
        k = w.shape[1]
        scales, zeros = (x.to(dtype) for x in (w.scales, w.zeros))  # [G, n]
        self.qweight, self.dtype = w.qweight, upcast(scales).dtype
        self.shifts = None if w.rounding == "sub" else upcast(-(zeros * scales))
        self.scales, self.zeros = upcast(scales), upcast(zeros)
        # A run is columns of one group side by side; groups that cut tiles have none in the order of the bytes.
        runs = block_k if w.group_size == k else math.gcd(block_k, w.group_size)
        self.run = runs if runs % TILE_K == 0 else 1
        groups = torch.arange(k, device=w.scales.device) // w.group_size
        self.run_groups = permute_to_byte_order(groups)[:: self.run]

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Rows and columns of the weight, [n', k']: whole blocks of columns, or the last, padded to whole tiles."""
        i = slice(rows.start // TILE_N, -(-rows.stop // TILE_N))
        tiles = self.qweight[i, columns.start // TILE_K : -(-columns.stop // TILE_K)]
        weight = unpack_block(tiles, self.dtype)[: rows.stop - rows.start]
        groups = self.run_groups[columns.start // self.run : -(-columns.stop // self.run)]
        by_run = weight.unflatten(1, (len(groups), -1))  # [n', runs, columns of a run]

        def per_run(x: Tensor) -> Tensor:
            return x[groups, rows].t()[..., None]  # [n', runs, 1]

        if self.shifts is None:
            by_run.sub_(per_run(self.zeros)).mul_(per_run(self.scales))
        else:
            by_run.mul_(per_run(self.scales)).add_(per_run(self.shifts))
        return weight
