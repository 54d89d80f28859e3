"""The signature of a call: all that its check, its choices, its config and its launches may depend on but numbers.

Of tensors these are shape, dtype, device, strides and whether their address is a multiple of 16, of numbers, texts and
None their values, of a dataclass such as `Int4` its type and its fields. Two calls of one signature need one check.
"""

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_TENSORS = (Tensor, torch.nn.Parameter)
_SCALARS = (int, float, bool, str, type(None))
Signature = tuple[tuple[Any, ...], list[Tensor]]


def call_signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature | None:
    """Return the signature of a call and the tensors that it holds; None if an argument is of another kind, such as a
    tensor that is traced.
    """
    parts: list[Any] = [*kwargs]
    tensors: list[Tensor] = []
    try:
        is_known = _describe(args, parts, tensors) and _describe(kwargs.values(), parts, tensors)
    except RuntimeError:  # a tensor without memory, of torch.func, or without strides
        return None
    return (tuple(parts), tensors) if is_known else None


@cache
def is_record(kind: type) -> bool:
    """Return True for dataclasses, whose fields describe them."""
    return is_dataclass(kind)


def _describe(values: Iterable[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Append what the values are, each beginning with its type or, for a tensor, its shape; False if one is unknown."""
    for x in values:
        kind = type(x)
        if kind in _TENSORS:
            parts += (x.shape, x.dtype, x.device, x.stride(), x.data_ptr() % 16 == 0)
            tensors.append(x)
        elif kind in _SCALARS:
            parts += (kind, x)  # with its type: True, 1 and 1.0 are equal
        elif is_record(kind):
            parts.append(kind)
            if not _describe(vars(x).values(), parts, tensors):
                return False
        else:
            return False
    return True
