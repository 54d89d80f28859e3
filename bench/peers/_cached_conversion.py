"""What a library wants in its own form, made once and kept as long as what it was made from."""

from collections.abc import Callable, Hashable
from typing import Any
from weakref import ref

from torch.utils.weak import WeakIdKeyDictionary

from ..correctness.guarded_memory import tensors

_made: Any = WeakIdKeyDictionary()


def prepared(convert: Callable[..., Any], first: Any, *rest: Any, **options: Hashable) -> Any:
    """convert(first, *rest, **options), remembered for these very objects (weights, tensors) until torch writes into
    one of them, and forgotten with the first of them.

    What comes out may not refer to `first`, or neither would ever be freed.
    """
    known = _made.setdefault(first, {})
    key = convert, *sorted(options.items())
    writes = [x._version for x in tensors((first, *rest)) if not x.is_inference()]
    if key not in known or known[key][1] != writes or any(old() is not new for old, new in zip(known[key][0], rest)):
        known[key] = tuple(map(ref, rest)), writes, convert(first, *rest, **options)
    return known[key][2]
