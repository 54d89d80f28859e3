"""torchao's int4 linear in tinygemm's layout (`Int4TilePackedTo4dTensor`): CUDA, w = (code - 8) · scale + zero.

    pip install --no-deps torchao==0.18.0

bfloat16 and groups of 32, 64, 128 or 256 only. The zero of a group is (8 - z) · scale rounded to bfloat16, which moves
every weight of it; k is padded to a multiple of 1024 and n to one of 8, as the library does.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.registry import Unsupported

from ._awq import check_plain_call, pad_rows
from ._cached_conversion import convert_once
from ._import_file import require_cuda
from ._offline import check_tensors

workflows: Any = import_module("torchao.quantization.quantize_.workflows")
torchao: Any = import_module("torchao.quantization.utils")
require_cuda("torchao")
GROUP_SIZES = (32, 64, 128, 256)
INNER_K_TILES = 8  # the only one its tensor uses


def pack_tinygemm(w: Int4) -> Tensor:
    """The weight as the library's tensor of shape [n, k]."""
    w_padded = pad_rows(w, 8)
    extra_k = -w.shape[1] % 1024
    q = F.pad(unpack_codes(w_padded), (0, extra_k))
    scales, zeros = (
        F.pad(x.t(), (0, extra_k // w.group_size)) for x in (w_padded.scales, (8 - w_padded.zeros) * w_padded.scales)
    )
    packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), INNER_K_TILES)
    shifts = torchao.pack_tinygemm_scales_and_zeros(scales, zeros, scales.dtype)
    return workflows.Int4TilePackedTo4dTensor(packed, shifts, [1, w.group_size], torch.Size(w.shape))


@int4_matmul.impl("torchao")
def int4_matmul_torchao(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Multiplies x [..., k] by the weight [n, k] with torchao's kernel and returns [..., n].

    Raises Unsupported for calls, dtypes and group sizes that it does not take.
    """
    check_plain_call("torchao", w, bias, residual)
    check_tensors("torchao", x, w.scales, dtypes=[torch.bfloat16], interpreted=False)
    if w.group_size not in GROUP_SIZES:
        raise Unsupported(f"torchao: the group is {w.group_size}, supported are {GROUP_SIZES}")
    return F.linear(x, convert_once(pack_tinygemm, w))
