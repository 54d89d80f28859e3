"""GPTQModel's Triton AWQ GEMM: the plan its scheduler picks, sums in float32 (its default).

    pip install --no-deps --no-build-isolation gptqmodel==7.7.0

Only the file of the kernel is imported, since the package asks for a newer torch and patches transformers. float16; n
is padded to a multiple of 8.
"""

import torch
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry import Unsupported

from ._awq import check_plain_call, to_awq_layout
from ._cached_conversion import convert_once
from ._import_file import import_single_file
from ._offline import check_tensors, fake_gpu

gemm = import_single_file("gptqmodel.quantization.awq.modules.triton.gemm")
scheduler = import_single_file("gptqmodel.quantization.awq.modules.triton.scheduler")


@int4_matmul.impl("gptqmodel")
def int4_matmul_gptqmodel(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Multiplies x [..., k] by the weight [n, k] with GPTQModel's kernels and returns [..., n].

    Raises Unsupported for calls, dtypes and group sizes that they do not take.
    """
    check_plain_call("gptqmodel", w, bias, residual)
    check_tensors("gptqmodel", x, w.scales, dtypes=[torch.float16])
    if w.group_size not in scheduler.SUPPORTED_GROUP_SIZES:
        raise Unsupported(f"gptqmodel: the group is {w.group_size}, supported are {scheduler.SUPPORTED_GROUP_SIZES}")
    n, k = w.shape
    qweight, qzeros, scales = convert_once(to_awq_layout, w, row_multiple=8)
    rows = x.reshape(-1, k).contiguous()  # [m, k]
    with fake_gpu(x):
        plan = scheduler.select_awq_triton_plan(
            M=len(rows),
            N=scales.shape[1],
            K=k,
            group_size=w.group_size,
            device=x.device,
            input_dtype=x.dtype,
            compute_dtype=x.dtype,
            output_dtype=x.dtype,
        )
        if plan.fused:
            out = gemm.awq_gemm_triton(rows, qweight, scales, qzeros, output_dtype=x.dtype, **plan.as_kwargs())
        else:
            out = rows @ gemm.awq_dequantize_triton(qweight, scales, qzeros)
    return out[:, :n].reshape(*x.shape[:-1], n)
