"""cvt of PTX: `conversion` gives the function from arrays of one type to arrays of another.

Integers are arrays of their dtype; f32 and f64 are numpy's; f16, bf16 and pairs of 8-bit floats are uint16; f16x2,
bf16x2 and tf32 are uint32. Where PTX makes one word of two numbers, the function takes both, the upper one first.
"""

from collections.abc import Callable, Collection

import numpy as np

from .integers import SIGNED, UNSIGNED, clamped
from .numbers import (
    NARROW,
    ROUNDERS,
    WIDEN,
    f2,
    f4,
    f8,
    f16_f32,
    ftz,
    halves,
    i8,
    joined,
    odd,
    relu,
    rounded32,
    saturate,
    u1,
    u2,
    u4,
    u8,
)

MODES = ("rn", "rz", "rm", "rp", "rna")
LARGEST = {"f16": 0x7BFF, "bf16": 0x7F7F, "tf32": 0x7F7FE000}


def integer_dtype(t: str):
    """The numpy type of an integer type of PTX; None for others."""
    return (SIGNED if t[0] == "s" else UNSIGNED)[int(t[1:]) // 8] if t[0] in "us" else None


def conversion(to: str, source: str, modifiers: Collection[str]) -> Callable:
    """cvt.MODIFIERS.to.source. NotImplementedError for what PTX does not have, or this does not know."""
    mode = next((m for m in MODES if m in modifiers), "rn")
    whole = next((m for m in ROUNDERS if m in modifiers), None)
    known = {*MODES, *ROUNDERS, "ftz", "sat", "satfinite", "relu", "pack"}
    if unknown := set(modifiers) - known:
        raise NotImplementedError(f"cvt with .{' .'.join(sorted(unknown))}")
    into, from_ = integer_dtype(to), integer_dtype(source)
    flush, sat = "ftz" in modifiers, "sat" in modifiers
    if into and from_:
        return (lambda x: _clamped(x, into)) if sat else (lambda x: x.astype(into))
    if into:
        return lambda x: to_int(ftz(x) if flush else widened(x, source), into, whole or "rzi", source == "f64")
    if to in ("e4m3x2", "e5m2x2"):
        kind = to[:4]
        pair = "relu" in modifiers
        if source == "f32":
            return lambda high, low: to_f8(high, kind, pair).astype(u2) << u2(8) | to_f8(low, kind, pair)
        return lambda x: _joined_bytes(to_f8(f16_f32(halves(x)), kind, pair))
    if source in ("e4m3x2", "e5m2x2"):
        table = F8_F16[source[:4]]
        bytes_to = (lambda x: relu("f16", table[_bytes(x)])) if "relu" in modifiers else (lambda x: table[_bytes(x)])
        return lambda x: joined(bytes_to(x))
    if to in ("f16x2", "bf16x2"):
        one = conversion(to[:-2], source, modifiers)
        return lambda high, low: one(high).astype(u4) << u4(16) | one(low)
    if to == "tf32":
        return _finite(_relu(lambda x: to_tf32(x, mode), "tf32", modifiers), "tf32", modifiers)
    if from_:
        return _post(lambda x: from_int(x, to, mode), to, modifiers)
    if to == source == "f32" or to == source == "f64":
        step = ROUNDERS[whole] if whole else lambda x: x + 0
        return _post((lambda x: step(ftz(x))) if flush else step, to, modifiers)
    if to in WIDEN and whole:
        return _post(lambda x: narrowed(ROUNDERS[whole](widened(x, source)), to, mode), to, modifiers)
    return _post(
        lambda x: narrowed(widened(ftz(x) if flush and source == "f32" else x, source), to, mode), to, modifiers
    )


def _post(function: Callable, to: str, modifiers: Collection[str]) -> Callable:
    """The last steps of a result: .relu, .satfinite, .sat and .ftz."""
    function = _finite(_relu(function, to, modifiers), to, modifiers)
    if "sat" in modifiers:
        if to in WIDEN:
            return lambda x: NARROW[to](saturate(WIDEN[to](function(x))))
        inner = function
        function = lambda x: saturate(inner(x))  # noqa: E731
    if "ftz" in modifiers and to == "f32":
        return lambda x: ftz(function(x))
    return function


def _relu(function: Callable, to: str, modifiers: Collection[str]) -> Callable:
    if "relu" not in modifiers:
        return function
    if to == "tf32":
        return lambda x: relu("f32", function(x).view(f4)).view(u4)
    return lambda x: relu(to, function(x))


def _finite(function: Callable, to: str, modifiers: Collection[str]) -> Callable:
    """.satfinite: the largest finite number in place of an infinity."""
    if "satfinite" not in modifiers:
        return function
    largest = LARGEST[to]
    infinity = {"f16": 0x7C00, "bf16": 0x7F80, "tf32": 0x7F800000}[to]

    def finite(x):
        bits = function(x)
        dtype = bits.dtype.type
        sign = dtype(1 << (8 * bits.dtype.itemsize - 1))
        return np.where((bits & ~sign) == dtype(infinity), (bits & sign) | dtype(largest), bits)

    return finite


def widened(x, source: str):
    """A half precision as float32; others as they are."""
    return WIDEN[source](x) if source in WIDEN else x


def narrowed(x, to: str, mode: str):
    """float32 or float64 -> a float type, rounded once."""
    if to == "f64":
        return x.astype(f8)
    if to == "f32":
        return x if x.dtype == f4 else rounded32(x, mode)
    if x.dtype == f8:
        x = odd(x)
    if mode == "rn":
        return NARROW[to](x)
    bits = NARROW[to](x)
    back = WIDEN[to](bits)
    grew = np.abs(back) > np.abs(x)
    wrong = {"rz": grew, "rm": back > x, "rp": back < x}[mode]
    # the next number toward zero, or away from it, is one less or more in bits; from zero it has the sign of x
    step = np.where(grew, bits - u2(1), bits + u2(1))
    return np.where(wrong, step | (np.signbit(x).astype(u2) << u2(15)), bits)


def to_tf32(x, mode: str):
    """float32 -> tf32: "rna" to the nearest, halves away from zero; NaN is 0x7fffffff."""
    bits = x.view(u4)
    if mode == "rn":
        r = bits + u4(0x0FFF) + ((bits >> u4(13)) & u4(1))
    else:
        r = bits + u4(0x1000) if mode == "rna" else bits.copy()
    r &= u4(0xFFFFE000)
    if (nan := np.isnan(x)).any():
        r[nan] = 0x7FFFFFFF
    return r


# ---- integers


def _clamped(x, dtype):
    if x.dtype == u8:
        return np.minimum(x, u8(np.iinfo(dtype).max)).astype(dtype)
    return np.maximum(x, i8(0)).astype(u8) if dtype == u8 else clamped(x.astype(i8), dtype)


def to_int(x, dtype, how: str, wide: bool = False):
    """Saturating. NaN is 0, or only the highest bit if float64 (`wide`) or 64-bit integers take part."""
    info = np.iinfo(dtype)
    r = ROUNDERS[how](x.astype(f8))
    low, high = f8(info.min), f8(info.max)
    out = np.clip(r, low, np.nextafter(high, 0) if info.bits == 64 else high)
    nan = np.isnan(x)
    out = np.where(nan, 0, out).astype(dtype)
    if info.bits == 64:
        out = np.where(r >= high, dtype(info.max), out)
    if (wide or info.bits == 64) and nan.any():
        out[nan] = info.min if info.min else 1 << (info.bits - 1)
    return out


def from_int(x, to: str, mode: str):
    """An integer as a float type, rounded once."""
    if x.dtype.itemsize == 8:
        size = np.where(x < 0, -x, x).view(u8)
        sticky = (size & u8(0x7FF)) != 0
        big = ((size >> u8(11)) | sticky).astype(f8) * 2048.0
        exact = np.where(size >> u8(53), big, size.astype(f8))
        exact = np.where(x < 0, -exact, exact)
        if to == "f64":
            near = x.astype(f8)
            if mode == "rn":
                return near
            raise NotImplementedError(f"cvt.{mode}.f64 of 64-bit integers")
    else:
        exact = x.astype(f8)
    return narrowed(exact, to, mode)


# ---- 8-bit floats


def _f8_values(exponent: int, mantissa: int, bias: int) -> np.ndarray:
    """The 128 numbers without a sign, infinities and NaN as if they went on."""
    bits = np.arange(128)
    e, m = bits >> mantissa, bits & ((1 << mantissa) - 1)
    return np.where(e > 0, (1 + m / (1 << mantissa)) * 2.0 ** (e - bias), m / (1 << mantissa) * 2.0 ** (1 - bias))


# The largest finite number of each, as its bits.
TOP = {"e4m3": 0x7E, "e5m2": 0x7B}
F8_VALUES = {"e4m3": _f8_values(4, 3, 7), "e5m2": _f8_values(5, 2, 15)}


def _f8_f16(kind: str) -> np.ndarray:
    """The bits of float16 of each of 256 numbers."""
    bits = np.minimum(F8_VALUES[kind], 60000).astype(f2).view(u2)
    bits[TOP[kind] + 1 :] = 0x7FFF
    if kind == "e5m2":
        bits[0x7C] = 0x7C00
    return np.concatenate([bits, np.where(bits == 0x7FFF, bits, bits | 0x8000)]).astype(u2)


F8_F16 = {kind: _f8_f16(kind) for kind in F8_VALUES}


def _bytes(x):
    """[..., T] of 16 bits -> [..., T, 2] of 8, low one first."""
    return np.ascontiguousarray(x).reshape((*x.shape, 1)).view(u1)


def _joined_bytes(x):
    return np.ascontiguousarray(x).view(u2)[..., 0]


def to_f8(x, kind: str, positive: bool = False):
    """float32 -> an 8-bit float, to the nearest even, at most the largest one; NaN is 0x7f; `positive` is relu."""
    values = F8_VALUES[kind][: TOP[kind] + 1]
    size = np.abs(x).astype(f8)
    middle = (values[1:] + values[:-1]) / 2
    n = np.searchsorted(middle, size)  # a number in the middle is below it
    n = n + ((n < len(middle)) & (size == middle[np.minimum(n, len(middle) - 1)]) & (n & 1 == 1))
    r = n.astype(u1) | (np.signbit(x).astype(u1) << u1(7))
    if positive:
        r = np.where(r & u1(0x80), u1(0), r)
    return np.where(np.isnan(x), u1(0x7F), r)
