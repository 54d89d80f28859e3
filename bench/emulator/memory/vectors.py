"""Vector accesses: a thread moves several elements of memory as one word."""

from collections.abc import Sequence

import numpy as np

from .regions import WORD

Array = np.ndarray


def split_words(words: Array, width: int, count: int) -> list[Array]:
    """The elements of `width` bytes that each word holds, `count` arrays of the words' shape."""
    if count == 1:
        return [words]
    parts = words.view(WORD[width]).reshape(*words.shape, count)
    return list(np.ascontiguousarray(np.moveaxis(parts, 2, 0)))


def join_words(elements: Sequence[Array], width: int, shape: tuple[int, int]) -> Array:
    """Words of the shape, each of the elements of `width` bytes that a thread writes."""
    if len(elements) == 1:
        return np.broadcast_to(elements[0], shape)
    parts = np.empty((*shape, len(elements)), WORD[width])
    for n, x in enumerate(elements):
        parts[:, :, n] = x
    return parts.view(WORD[width * len(elements)])[:, :, 0]
