"""Conversions to a library's own layout, made once and kept as long as the tensors they were made from."""

from collections.abc import Callable, Hashable
from typing import Any
from weakref import ref

from torch.utils.weak import WeakIdKeyDictionary

from ..correctness.guarded_memory import tensors

_conversions: Any = WeakIdKeyDictionary()


def convert_once(convert: Callable[..., Any], first: Any, *others: Any, **options: Hashable) -> Any:
    """convert(first, *others, **options), remembered for these very objects (weights, tensors) until torch writes into
    one of them, and dropped with the first of them.

    The result may not refer to `first`, or neither would ever be freed.
    """
    conversions = _conversions.setdefault(first, {})
    key = convert, *sorted(options.items())
    versions = [x._version for x in tensors((first, *others)) if not x.is_inference()]
    if (
        key not in conversions
        or conversions[key][1] != versions
        or any(old() is not new for old, new in zip(conversions[key][0], others))
    ):
        conversions[key] = tuple(map(ref, others)), versions, convert(first, *others, **options)
    return conversions[key][2]
