"""What a library wants in its own form, made once and kept as long as what it was made from."""

from collections.abc import Callable, Hashable
from typing import Any
from weakref import ref

from torch.utils.weak import WeakIdKeyDictionary

_made: Any = WeakIdKeyDictionary()


def prepared(convert: Callable[..., Any], first: Any, *rest: Any, **options: Hashable) -> Any:
    """convert(first, *rest, **options), remembered for these very objects and forgotten with the first of them.

    The objects (weights, tensors) must keep their values, as arguments of a timed call do; what comes out may not
    refer to `first`, or neither would ever be freed.
    """
    known = _made.setdefault(first, {})
    key = convert, *sorted(options.items())
    if key not in known or any(old() is not new for old, new in zip(known[key][0], rest)):
        known[key] = tuple(map(ref, rest)), convert(first, *rest, **options)
    return known[key][1]
