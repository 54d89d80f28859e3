"""AutoAWQ's Triton GEMM, used as its `WQLinear_GEMM` does: fused below 1024 rows, else dequantized and given to torch.

    pip install --no-deps --no-build-isolation autoawq==0.2.9

Only `awq/modules/triton/gemm.py` is imported, since the package asks for older transformers. float16; n is padded to a
multiple of 8. Its partial sums, eight along k, are kept and added up in float16.
"""

import torch
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry import Unsupported

from ._awq import check_plain_call, to_awq_layout
from ._cached_conversion import convert_once
from ._import_file import import_single_file
from ._offline import check_tensors, fake_gpu

gemm = import_single_file("awq.modules.triton.gemm")
MIN_DENSE_ROWS = 1024
SPLIT_K = 8


@int4_matmul.impl("autoawq")
def int4_matmul_autoawq(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Multiplies x [..., k] by the weight [n, k] with AutoAWQ's kernels and returns [..., n].

    Raises Unsupported for calls, dtypes and group sizes that they do not take.
    """
    check_plain_call("autoawq", w, bias, residual)
    check_tensors("autoawq", x, w.scales, dtypes=[torch.float16])
    if w.group_size not in gemm.AWQ_TRITON_SUPPORTED_GROUP_SIZES and w.group_size != w.shape[1]:
        raise Unsupported(
            f"autoawq: the group is {w.group_size}, supported are {gemm.AWQ_TRITON_SUPPORTED_GROUP_SIZES}"
        )
    n, k = w.shape
    qweight, qzeros, scales = convert_once(to_awq_layout, w, row_multiple=8)
    rows = x.reshape(-1, k).contiguous()  # [m, k]
    with fake_gpu(x):
        if len(rows) >= MIN_DENSE_ROWS:
            out = rows @ gemm.awq_dequantize_triton(qweight, scales, qzeros)
        else:
            out = gemm.awq_gemm_triton(rows, qweight, scales, qzeros, SPLIT_K)
    return out[:, :n].reshape(*x.shape[:-1], n)
