"""Our int4 weight in AutoAWQ's layout "gemm", which several libraries share.

qweight [k, n/8] int32, qzeros [G, n/8] int32, scales [G, n] (casper-hansen/AutoAWQ, `WQLinear_GEMM`).
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vila_triton.formats import pack_gemm
from vila_triton.ops import Int4
from vila_triton.ops.linear import codes


class Awq(NamedTuple):
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def awq(w: Int4) -> Awq:
    """w [n, k], n a multiple of 8, in the layout "gemm"."""
    return Awq(pack_gemm(codes(w)), pack_gemm(w.zeros.int()), w.scales.t().contiguous())


def padded(w: Int4, multiple: int) -> Int4:
    """w with rows of zeros below, so that n becomes a multiple of the given number."""
    below = -w.shape[0] % multiple
    return Int4(*(F.pad(x, (0, 0, 0, below)) for x in (w.qweight, w.scales, w.zeros)))
