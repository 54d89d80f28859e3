"""Atomic operations on arrays, one thread after the other, in the order of the blocks and then of the threads."""

from collections.abc import Callable

import numpy as np

Array = np.ndarray
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {2: np.float16, 4: np.float32, 8: np.float64}


def apply_atomic(
    memory: Array,
    index: Array,
    mask: Array | None,
    operation: str,
    kind: str,
    values: list[Array],
    old: Array | None,
) -> Array:
    """Apply an operation to elements of an unsigned array, and return the elements before.

    memory      [elements], unsigned, changed in place
    index       [blocks, threads] of elements
    mask        which threads take part; None: all
    operation   add, min, max, and, or, xor, exch, cas, inc, dec
    kind        of the numbers, as in PTX: f32, s64, b32, f16x2 …
    values      one operand, or for cas the compared and the new one; unsigned
    old         what other threads get; None: 0
    """
    shape = index.shape
    held = np.ones(shape, bool) if mask is None else mask
    at = index[held]
    operands = [np.broadcast_to(x, shape)[held].astype(memory.dtype) for x in values]
    compute = OPERATIONS[operation]
    before = np.empty(len(at), memory.dtype)
    for turn in turns(at):
        where = at[turn]
        before[turn] = memory[where]
        memory[where] = compute(kind, before[turn], *[x[turn] for x in operands])
    result = np.zeros(shape, memory.dtype) if old is None else np.broadcast_to(old, shape).astype(memory.dtype)
    result[held] = before
    return result


def turns(at: Array) -> list[Array]:
    """The places of `at` in as many turns as its most frequent number needs: the first of each, the second …"""
    order = np.argsort(at, kind="stable")
    ordered = at[order]
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1)) if len(at) else np.zeros(0, np.int64)
    if len(first) == len(at):
        return [order]
    turn = np.arange(len(at)) - np.repeat(first, np.diff(first, append=len(at)))
    by_turn = np.argsort(turn, kind="stable")
    return np.split(order[by_turn], np.flatnonzero(np.diff(turn[by_turn])) + 1)


def in_numbers(compute: Callable[[Array, Array], Array]) -> Callable[[str, Array, Array], Array]:
    """An operation on unsigned bits from one on numbers of their kind."""

    def on_bits(kind: str, a: Array, b: Array) -> Array:
        if kind.endswith("x2"):
            low = on_bits(kind[:-2], a.astype(np.uint16), b.astype(np.uint16))
            high = on_bits(kind[:-2], (a >> 16).astype(np.uint16), (b >> 16).astype(np.uint16))
            return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
        if kind.startswith("bf"):
            wide = compute(*((x.astype(np.uint32) << np.uint32(16)).view(np.float32) for x in (a, b)))
            bits = wide.view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
            return np.where(np.isnan(wide), np.uint32(0x7FFF), rounded).astype(np.uint16)
        dtype = FLOAT[a.itemsize] if kind[0] == "f" else SIGNED[a.itemsize] if kind[0] == "s" else a.dtype
        return compute(a.view(dtype), b.view(dtype)).view(a.dtype)

    return on_bits


def smaller(a: Array, b: Array) -> Array:
    """The minimum; a number wins over NaN."""
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def larger(a: Array, b: Array) -> Array:
    """The maximum; a number wins over NaN."""
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": in_numbers(np.add),
    "min": in_numbers(smaller),
    "max": in_numbers(larger),
    "and": lambda kind, a, b: a & b,
    "or": lambda kind, a, b: a | b,
    "xor": lambda kind, a, b: a ^ b,
    "exch": lambda kind, a, b: b,
    "cas": lambda kind, a, compared, new: np.where(a == compared, new, a),
    "inc": lambda kind, a, b: np.where(a >= b, 0, a + 1).astype(a.dtype),
    "dec": lambda kind, a, b: np.where((a == 0) | (a > b), b, a - 1).astype(a.dtype),
}
