"""Copies of int4 weights in the layouts of torch's own products, kept as long as the weight.

A copy is made when a weight is first used, and lives as long as the tensor object `qweight`; if the weight is written
to, it is made again. A weight created under `torch.inference_mode` does not count writes, and is therefore packed at
every call. Writes through `.data` are not counted for any weight, and go unnoticed here. `packed_bytes` says what the
copies of a model take.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vila_triton.ops import Int4

Pack = Callable[[Int4, torch.dtype], tuple[Tensor, ...]]

# qweight -> by function that packs: (version of the weight, aliases of its tensors, the packed copy)
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def weight_tensors(w: Int4) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three tensors that hold a weight: its codes, scales and zeros."""
    return w.qweight, w.scales, w.zeros


def weight_version(w: Int4, dtype: torch.dtype) -> tuple:
    """A key that changes with the weight: the memory of its tensors, and the number of writes to each."""
    tensors = ((x.data_ptr(), x.dtype, x.shape, x.stride(), x._version) for x in weight_tensors(w))
    return dtype, w.group_size, w.rounding, *tensors


def packed_copy(w: Int4, dtype: torch.dtype, pack: Pack) -> tuple[Tensor, ...]:
    """Return the weight as `pack` packs it for inputs of a dtype, from memory unless it was written to since."""
    if any(x.is_inference() for x in weight_tensors(w)):
        return pack(w, dtype)
    if w.qweight not in _copies:
        _copies[w.qweight] = {}
    version, copies = weight_version(w, dtype), _copies[w.qweight]
    if pack not in copies or copies[pack][0] != version:
        # The aliases keep the memory alive, so that no other tensor can be at these addresses while the copy is kept.
        copies[pack] = version, [x.detach() for x in weight_tensors(w)], pack(w, dtype)
    return copies[pack][-1]


def packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all copies that are kept of the weights whose codes are among some tensors."""
    kept = (_copies[x] for x in tensors if x in _copies)
    return sum(x.nbytes for copies in kept for *_, packed in copies.values() for x in packed)
