"""Our int4 weight in AutoAWQ's layout "gemm", which several libraries share.

Codes are packed along n, eight to a word in the order 0 2 4 6 1 3 5 7 (casper-hansen/AutoAWQ, `WQLinear_GEMM`):
qweight [k, n/8] int32, qzeros [G, n/8] int32, scales [G, n].
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Int4
from vila_triton.ops.linear import NIBBLES, codes, pack

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is column ORDER[i] of its eight


class Awq(NamedTuple):
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def pack_awq(q: Tensor) -> Tensor:
    """Codes [r, n] of 0 to 15 -> words [r, n/8] int32."""
    return pack(q.unflatten(1, (-1, NIBBLES))[..., ORDER].flatten(1))  # [r, n] -> [r, n/8, 8] -> [r, n]


def awq(w: Int4) -> Awq:
    """w [n, k], n a multiple of 8, in the layout "gemm"."""
    return Awq(pack_awq(codes(w).t()), pack_awq(w.zeros.t().int()), w.scales.t().contiguous())


def padded(w: Int4, multiple: int) -> Int4:
    """w with rows of zeros below, so that n becomes a multiple of the given number."""
    below = -w.shape[0] % multiple
    return Int4(*(F.pad(x, (0, 0, 0, below)) for x in (w.qweight, w.scales, w.zeros)))
