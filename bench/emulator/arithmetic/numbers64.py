"""Sums, products and quotients of float64 in every rounding mode.

numpy rounds sums and quotients to the nearest. A fused product goes by exact sums of two float64 where sizes allow it;
it and the other modes go by fractions else, element by element.
"""

import math
from fractions import Fraction

import numpy as np

from .numbers import f8, odd_sum

SPLIT = f8(2.0**27 + 1)


def two_sum(a, b):
    """The rounded sum and its exact error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a, b):
    """The rounded product and its exact error, for factors that are neither huge nor tiny."""
    p = a * b
    x, y = a * SPLIT, b * SPLIT
    ah, bh = x - (x - a), y - (y - b)
    al, bl = a - ah, b - bh
    return p, al * bl - (((p - ah * bh) - al * bh) - ah * bl)


def moderate(*arrays) -> bool:
    """True if products and their errors stay in range: between 2**-300 and 2**300, or zero."""
    return all(((np.abs(x) < 2.0**300) & ((np.abs(x) > 2.0**-300) | (x == 0))).all() for x in arrays)


def fma(a, b, c, mode="rn"):
    """a * b + c, rounded once."""
    plain = a * b + c
    if mode == "rn" and moderate(a, b, c):
        p, low = two_product(a, b)
        t, t_low = two_sum(c, low)
        v, v_low = two_sum(p, t)
        r = v + odd_sum(t_low, v_low)
        return np.where(r == 0, plain, r)
    opposite = (np.signbit(a) != np.signbit(b)) != np.signbit(c)
    return _each(lambda x, y, z: x * y + z, mode, plain, opposite, a, b, c)


def add(a, b, mode="rn"):
    """a + b, rounded once."""
    if mode == "rn":
        return a + b
    return _each(lambda x, y: x + y, mode, a + b, np.signbit(a) != np.signbit(b), a, b)


def mul(a, b, mode="rn"):
    """a * b, rounded once."""
    return a * b if mode == "rn" else _each(lambda x, y: x * y, mode, a * b, False, a, b)


def divide(a, b, mode="rn"):
    """a / b, rounded once."""
    q = np.divide(a, b)
    return q if mode == "rn" else _each(lambda x, y: x / y if y else None, mode, q, False, a, b)


def square_root(x, mode="rn"):
    """The square root, rounded once."""
    near = np.sqrt(x)
    if mode != "rn":  # the sign of x - near * near says on which side the root lies
        scale = np.where(x < 2.0**-600, 2.0**300, 1.0)  # the product of the last bits is in range, too
        gap = fma(-near * scale, near * scale, x * scale * scale)
        step = {"rz": gap < 0, "rm": gap < 0, "rp": gap > 0}[mode]
        near = np.where(step, np.nextafter(near, np.inf if mode == "rp" else -np.inf), near)
    return near


def _each(function, mode, plain, opposite, *args):
    """An operation by fractions. `plain` is numpy's result, which holds where an argument is not finite or the result
    is zero; zeros of `opposite` terms are negative when rounding down."""
    plain, opposite, *arrays = np.broadcast_arrays(plain, opposite, *args)
    out = plain.copy()
    for n, values in enumerate(zip(*(x.ravel().tolist() for x in arrays))):
        exact = function(*map(Fraction, values)) if all(map(math.isfinite, values)) else None
        if exact:
            out.flat[n] = rounded_fraction(exact, mode)
        elif exact == 0 and mode == "rm" and opposite.flat[n]:
            out.flat[n] = -0.0
    return out


def rounded_fraction(exact: Fraction, mode: str) -> float:
    """The float64 of a fraction that is not zero."""
    try:
        near = float(exact)
    except OverflowError:
        near = math.inf if exact > 0 else -math.inf
    above = near > 0 if math.isinf(near) else Fraction(near) > exact
    below = near < 0 if math.isinf(near) else Fraction(near) < exact
    if above and (mode == "rm" or (mode == "rz" and exact > 0)):
        return math.nextafter(near, -math.inf)
    if below and (mode == "rp" or (mode == "rz" and exact < 0)):
        return math.nextafter(near, math.inf)
    return near
