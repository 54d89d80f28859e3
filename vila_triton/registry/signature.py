"""The signature of a call: all that the checks of `requires`, the sizes of an op and so its choices may depend on.

Of tensors these are shape, dtype and device, of numbers, texts and None their values, of a dataclass such as `Int4` its
type and its fields. Two calls of one signature need one check.
"""

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

_TENSORS = (Tensor, torch.nn.Parameter)
_SCALARS = (int, float, bool, str, type(None))


def call_signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the signature of a call; None if an argument is of another kind, such as a tensor that is traced."""
    parts: list[Any] = [*kwargs]
    return tuple(parts) if _describe(args, parts) and _describe(kwargs.values(), parts) else None


def _describe(values: Iterable[Any], parts: list[Any]) -> bool:
    """Append what the values are, each beginning with its type or, for a tensor, its shape; False if one is unknown."""
    for x in values:
        kind = type(x)
        if kind in _TENSORS:
            parts += (x.shape, x.dtype, x.device)
        elif kind in _SCALARS:
            parts += (kind, x)  # with its type: True, 1 and 1.0 are equal
        elif is_dataclass(kind):
            parts.append(kind)
            if not _describe(vars(x).values(), parts):
                return False
        else:
            return False
    return True
