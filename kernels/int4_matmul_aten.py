"""x · wᵀ by torch's own int4 product for CPUs, `aten::_weight_int4pack_mm_for_cpu`.

It computes (code - 8) · scale + shift, where shift = (8 - zero) · scale is rounded to x's dtype, and sums in float32.
It is vectorized only in bfloat16; in float32 and float16 it is a scalar loop.

torch has a layout of its own for this. A weight is packed when it is first used, and the packed copy is kept as long as
the tensor object `qweight` lives; if the weight is written to, it is packed again. A weight created under
`torch.inference_mode` does not count writes, and is therefore packed at every call. Writes through `.data` are not
counted for any weight, and go unnoticed here.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.int4 import unpack_codes
from vila_triton.registry import Unsupported

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
GROUP_SIZES = (32, 64, 128, 256)

# qweight -> (version of the weight, aliases of its tensors, the packed copy)
_packed_weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def weight_version(w: Int4, dtype: torch.dtype) -> tuple:
    """A key that changes with the weight: the memory of its tensors, and the number of writes to each."""
    return dtype, w.group_size, *((x.data_ptr(), x.dtype, x.shape, x.stride(), x._version) for x in weight_tensors(w))


def weight_tensors(w: Int4) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three tensors that hold a weight: its codes, scales and zeros."""
    return w.qweight, w.scales, w.zeros


def pack_for_aten(w: Int4, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight in torch's layout: words [n, k/2] uint8, and scale and shift [G, n, 2]."""
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_codes(w), 1)
    scales = w.scales.to(dtype)
    shifts = ((8 - w.zeros.float()) * scales.float()).to(dtype)
    return words, torch.stack((scales, shifts), -1).contiguous()


def packed_weight(w: Int4, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weight as `pack_for_aten` packs it, from a cache that notices writes and skips inference tensors."""
    if any(x.is_inference() for x in weight_tensors(w)):
        return pack_for_aten(w, dtype)
    version = weight_version(w, dtype)
    if w.qweight not in _packed_weights or _packed_weights[w.qweight][0] != version:
        # The aliases keep the memory alive, so that no other tensor can be at these addresses while the copy is kept.
        _packed_weights[w.qweight] = version, [x.detach() for x in weight_tensors(w)], pack_for_aten(w, dtype)
    return _packed_weights[w.qweight][-1]


@int4_matmul.impl("aten")
def int4_matmul_aten(x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n]; raises Unsupported for what torch does not serve."""
    (n, k), group_size = w.shape, w.group_size
    if x.device.type != "cpu":
        raise Unsupported(f"int4_matmul: this product is torch's for CPUs, but tensors are on {x.device}")
    if x.dtype not in DTYPES:
        raise Unsupported(f"int4_matmul: {x.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if group_size not in GROUP_SIZES:
        raise Unsupported(f"int4_matmul: the group is {group_size}, but torch takes {', '.join(map(str, GROUP_SIZES))}")
    if w.rounding != "sub":
        raise Unsupported(f"int4_matmul: the rounding is {w.rounding!r}, but torch has its own formula")
    if n % 16:
        raise Unsupported(f"int4_matmul: w has {n} rows, but torch packs multiples of 16")
    rows = x.reshape(-1, k).contiguous()  # [m, k]
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    words, scales = packed_weight(w, x.dtype)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, words, group_size, scales).view(*x.shape[:-1], n)
    for term in (bias, residual):
        out = out if term is None else out + term
    return out
