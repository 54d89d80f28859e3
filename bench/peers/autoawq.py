"""AutoAWQ's Triton GEMM, used as its `WQLinear_GEMM` does: fused below 1024 rows, else dequantised and given to torch.

    pip install --no-deps --no-build-isolation autoawq==0.2.9

Only `awq/modules/triton/gemm.py` is imported, since the package asks for older transformers. float16; n is padded to a
multiple of 8. Its partial sums, eight along k, are kept and added up in float16.
"""

import torch
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry import Unsupported

from ._awq import Awq, awq, padded, plain
from ._cached_conversion import prepared
from ._import_file import borrow
from ._offline import check, offline

gemm = borrow("awq.modules.triton.gemm")
DENSE_ROWS = 1024
SPLIT_K = 8


def layout(w: Int4) -> Awq:
    return awq(padded(w, 8))


@int4_matmul.impl("autoawq")
def int4_matmul_autoawq(x: Tensor, w: Int4, bias: Tensor | None = None) -> Tensor:
    plain("autoawq", w, bias)
    check("autoawq", x, w.scales, dtypes=[torch.float16])
    if w.group not in gemm.AWQ_TRITON_SUPPORTED_GROUP_SIZES and w.group != w.shape[1]:
        raise Unsupported(f"autoawq: the group is {w.group}, supported are {gemm.AWQ_TRITON_SUPPORTED_GROUP_SIZES}")
    n, k = w.shape
    qweight, qzeros, scales = prepared(layout, w)
    rows = x.reshape(-1, k).contiguous()  # [m, k]
    with offline(x):
        if len(rows) >= DENSE_ROWS:
            out = rows @ gemm.awq_dequantize_triton(qweight, scales, qzeros)
        else:
            out = gemm.awq_gemm_triton(rows, qweight, scales, qzeros, SPLIT_K)
    return out[:, :n].reshape(*x.shape[:-1], n)
