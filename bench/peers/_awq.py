"""Our int4 weight in AutoAWQ's layout "gemm", which several libraries share.

qweight [k, n/8] int32, qzeros [G, n/8] int32, scales [G, n] (casper-hansen/AutoAWQ, `WQLinear_GEMM`).
"""

from dataclasses import replace
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vila_triton.checkpoints.int4_packing import pack_awq_gemm
from vila_triton.ops import Int4
from vila_triton.ops.int4_tiles import pack_tiles
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.registry import Unsupported


class AwqTensors(NamedTuple):
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def to_awq_layout(w: Int4, row_multiple: int) -> AwqTensors:
    """w [n, k] in the layout "gemm", n padded to a multiple of row_multiple, itself one of 8."""
    w = pad_rows(w, row_multiple)
    return AwqTensors(pack_awq_gemm(unpack_codes(w)), pack_awq_gemm(w.zeros.t().int()), w.scales.contiguous())


def pad_rows(w: Int4, multiple: int) -> Int4:
    """w with rows of zeros at the end, so that n becomes a multiple of the given number."""
    extra_rows = -w.shape[0] % multiple
    scales, zeros = (F.pad(x, (0, extra_rows)) for x in (w.scales, w.zeros))
    return replace(w, qweight=pack_tiles(F.pad(unpack_codes(w), (0, 0, 0, extra_rows))), scales=scales, zeros=zeros)


def check_plain_call(peer: str, w: Int4, bias: Tensor | None, residual: Tensor | None) -> None:
    """Unsupported for what the libraries are not asked to do: a bias, a residual, or llm-awq's rounding."""
    for name, term in {"bias": bias, "residual": residual}.items():
        if term is not None:
            raise Unsupported(f"{peer}: is compared without a {name}")
    if w.rounding != "sub":
        raise Unsupported(f"{peer}: is compared with the rounding 'sub', not {w.rounding!r}")
