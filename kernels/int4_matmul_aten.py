"""x · wᵀ by torch's own int4 product for CPUs, `aten::_weight_int4pack_mm_for_cpu`.

It computes (code - 8) · scale + shift, where shift = (8 - zero) · scale is rounded to x's dtype, and sums in float32.
Only in bfloat16 is it vectorised; in float32 and float16 it is a scalar loop.

The library has a layout of its own. A weight is packed when it is first used, and the copy is kept as long as
`qweight`, the tensor object, lives; written to in the meantime, the weight is packed again. A weight made under
`torch.inference_mode` does not tell when it is written to, and is therefore packed at every call. Nor does any weight
tell what is written through `.data`: that is not seen here.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.int4 import unpack_codes
from vila_triton.registry import Unsupported

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
GROUP_SIZES = (32, 64, 128, 256)

_packed_weights: WeakTensorKeyDictionary = (
    WeakTensorKeyDictionary()
)  # qweight -> (state of the weight, its leaves, its copy)


def weight_version(w: Int4, dtype: torch.dtype) -> tuple:
    """What changes when the weight does: which memory is read how, and how often each tensor was written to."""
    return dtype, w.group_size, *((x.data_ptr(), x.dtype, x.shape, x.stride(), x._version) for x in weight_tensors(w))


def weight_tensors(w: Int4) -> tuple[Tensor, Tensor, Tensor]:
    return w.qweight, w.scales, w.zeros


def pack_for_aten(w: Int4, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The library's layout: words [n, k/2] uint8, and scale and shift [G, n, 2]."""
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_codes(w), 1)
    scales = w.scales.to(dtype)
    shifts = ((8 - w.zeros.float()) * scales.float()).to(dtype)
    return words, torch.stack((scales, shifts), -1).contiguous()


def packed_weight(w: Int4, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if any(x.is_inference() for x in weight_tensors(w)):
        return pack_for_aten(w, dtype)
    version = weight_version(w, dtype)
    if w.qweight not in _packed_weights or _packed_weights[w.qweight][0] != version:
        # The memory is held through aliases: while a copy is kept, nothing else can come to lie at these addresses.
        _packed_weights[w.qweight] = version, [x.detach() for x in weight_tensors(w)], pack_for_aten(w, dtype)
    return _packed_weights[w.qweight][-1]


@int4_matmul.impl("aten")
def int4_matmul_aten(x: Tensor, w: Int4, bias: Tensor | None = None) -> Tensor:
    (n, k), group_size = w.shape, w.group_size
    if x.device.type != "cpu":
        raise Unsupported(f"int4_matmul: this product is torch's for CPUs, but tensors are on {x.device}")
    if x.dtype not in DTYPES:
        raise Unsupported(f"int4_matmul: {x.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if group_size not in GROUP_SIZES:
        raise Unsupported(f"int4_matmul: the group is {group_size}, but torch takes {', '.join(map(str, GROUP_SIZES))}")
    if w.rounding != "sub":
        raise Unsupported(f"int4_matmul: the order is {w.rounding!r}, but torch rounds as its own formula says")
    if n % 16:
        raise Unsupported(f"int4_matmul: w has {n} rows, but torch packs multiples of 16")
    rows = x.reshape(-1, k).contiguous()  # [m, k]
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    words, scales = packed_weight(w, x.dtype)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, words, group_size, scales).view(*x.shape[:-1], n)
    return out if bias is None else out + bias
