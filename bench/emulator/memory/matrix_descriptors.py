"""Descriptors of matrices in shared memory, as wgmma reads them: all swizzles and none, either axis contiguous.

The layouts are those of "Matrix Descriptor Format" and "Strides" in the PTX manual's chapter on wgmma.
"""

from typing import Any

import numpy as np

from .lockstep import Lockstep
from .shared_access import SEVERAL, Access, merge_accesses

SWIZZLE = {0: 16, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 -> bytes of a row
K_BYTES = 32  # of a row of either operand


def read_descriptor(
    machine: Lockstep, i: int, descriptor: np.ndarray, plan: Any, side: str, size: int
) -> tuple[Access, np.ndarray, tuple[int, int, int], bool]:
    """The access of an operand, the number of each of its elements, (warp groups, rows, columns), and if it is correct.

    descriptor   u8 [1 or blocks, 1 or threads]; a warp group has one
    plan         m, n, transpose_a, transpose_b and the kinds of the operands
    size         bytes of shared memory
    Errors: NotImplementedError for a base offset and for descriptors of several swizzles.
    """
    groups = machine.threads // 128
    blocks = len(descriptor)
    d = np.broadcast_to(descriptor, (blocks, machine.threads)).reshape(blocks, groups, 128)
    correct = bool((d == d[..., :1]).all())
    if not correct:
        bad = (d != d[..., :1]).reshape(blocks, -1)
        machine.fault(i, "descriptor", "the threads of a warp group hold different matrix descriptors", bad)
    d = d[..., :1, None].astype(np.uint64)  # [blocks, groups, 1, 1]
    start, lead, stride = (((d >> np.uint64(bit)) & np.uint64(0x3FFF)).astype(np.int64) * 16 for bit in (0, 16, 32))
    mode = np.unique(d >> np.uint64(62))
    if len(mode) > 1 or ((d >> np.uint64(49)) & np.uint64(7)).any():
        raise NotImplementedError("wgmma with a base offset, or descriptors of several swizzles in one instruction")
    width = SWIZZLE[int(mode[0])]
    rows = plan.m if side == "a" else plan.n
    transposed = plan.transpose_a if side == "a" else plan.transpose_b
    element = K_BYTES // plan.k
    row, column = np.arange(rows)[:, None], np.arange(plan.k)[None]
    if transposed:
        across, inner = row // (width // element), row % (width // element) * element
        wide, tall = (stride, lead) if width == 16 else (lead, stride)
        at = start + across * wide + column // 8 * tall + column % 8 * width + inner
    else:
        byte = column * element
        at = start + row // 8 * stride + row % 8 * width + byte // width * lead + byte % width
    at = at ^ (at >> 7 & (width // 16 - 1)) << 4
    bad = at + element > size
    if bad.any():
        text = f"wgmma reads shared byte {int(at[bad].max())} of {size}"
        machine.fault(i, "out of bounds", text, bad.any((2, 3)).repeat(128, 1))
        at, correct = np.where(bad, 0, at), False
    at = at.reshape(blocks, -1)
    return StreamAccess(at, element, machine.threads), at // element, (groups, rows, plan.k), correct


class StreamAccess(Access):
    """Shared memory as a warp group reads it, not thread by thread."""

    def __init__(self, address: np.ndarray, size: int, threads: int):
        super().__init__(address, None, size, threads)

    def _touched(self, granule: int, granules: int) -> tuple[np.ndarray, np.ndarray]:
        at = self.address // granule + np.arange(self.rows)[:, None] * granules
        at, _ = merge_accesses(at.ravel(), np.zeros(at.size, np.int64))
        return at, np.full(len(at), SEVERAL, np.int16)
