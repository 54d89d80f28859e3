"""lmdeploy's `awq_linear`: Triton with inline PTX, which turns two codes at a time into float16.

    pip install --no-deps lmdeploy==0.18.0

Only `awq_kernels.py` is imported, since the package asks for older torch. float16, groups that are a power of two from
16 (a block of k is a group); n is padded to a multiple of 128, its widest tile, because its loads have no mask in n.
Not for the interpreter, which knows no inline PTX. Without a GPU its first config is compiled, with one it times two.
"""

import torch
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry import Unsupported

from ._awq import check_plain_call, to_awq_layout
from ._cached_conversion import convert_once
from ._import_file import import_single_file
from ._offline import check_tensors, fake_gpu

kernels = import_single_file("lmdeploy.pytorch.kernels.cuda.awq_kernels")


@int4_matmul.impl("lmdeploy")
def int4_matmul_lmdeploy(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Multiplies x [..., k] by the weight [n, k] with lmdeploy's kernel and returns [..., n].

    Raises Unsupported for calls, dtypes and group sizes that it does not take.
    """
    check_plain_call("lmdeploy", w, bias, residual)
    check_tensors("lmdeploy", x, w.scales, dtypes=[torch.float16], interpreted=False)
    if w.group_size < 16 or w.group_size & (w.group_size - 1):
        raise Unsupported(
            f"lmdeploy: the group is {w.group_size}, but its block of k is a group, a power of two from 16"
        )
    n, k = w.shape
    qweight, qzeros, scales = convert_once(to_awq_layout, w, row_multiple=128)
    with fake_gpu(x):
        out = kernels.awq_linear(x.reshape(-1, k).contiguous(), qweight, scales, qzeros)
    return out[:, :n].reshape(*x.shape[:-1], n)
