"""Integer instructions of a GPU in numpy, for operands of 32 or 64 bits.

Arrays carry their sign in their dtype. Amounts of shifts and places of bits are uint32, and may exceed the width.
"""

import numpy as np

from .numbers import i4, i8, u1, u2, u4, u8

I1, I2 = np.int8, np.int16
UNSIGNED = {1: u1, 2: u2, 4: u4, 8: u8}
SIGNED = {1: I1, 2: I2, 4: i4, 8: i8}


def unsigned(x):
    """The same bits as unsigned integers."""
    return x.view(UNSIGNED[x.dtype.itemsize])


def width(x) -> int:
    """The bits of each element."""
    return 8 * x.dtype.itemsize


# ---- products, sums


def mul_hi(a, b):
    """The upper half of the product."""
    if a.dtype.itemsize < 8:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * a.dtype.itemsize]
        p = a.astype(wide) * b.astype(wide)
        return (p >> wide(width(a))).astype(a.dtype)
    x, y, low, bits = a.view(u8), b.view(u8), u8(0xFFFFFFFF), u8(32)
    xl, xh, yl, yh = x & low, x >> bits, y & low, y >> bits
    middle = xh * yl + ((xl * yl) >> bits)
    top = xh * yh + (middle >> bits) + ((xl * yh + (middle & low)) >> bits)
    if a.dtype.kind == "i":
        top = top - np.where(a < 0, y, u8(0)) - np.where(b < 0, x, u8(0))
    return top.view(a.dtype)


def mul24(a, b, high=False):
    """The lower or upper 32 of the 48 bits of the product of the lower 24 bits of each."""
    wide = i8 if a.dtype == i4 else u8
    eight = a.dtype.type(8)
    a, b = ((x << eight) >> eight for x in (a, b))
    p = a.astype(wide) * b.astype(wide)
    return ((p >> wide(16)) if high else p).astype(a.dtype)


def clamped(x, dtype):
    """An int64 within the range of a dtype."""
    info = np.iinfo(dtype)
    return np.clip(x, info.min, info.max).astype(dtype)


def add_sat(a, b):
    """add.sat.s32: the sum, at most at the limits of its type."""
    return clamped(a.astype(i8) + b.astype(i8), i4)


def sub_sat(a, b):
    """sub.sat.s32: the difference, at most at the limits of its type."""
    return clamped(a.astype(i8) - b.astype(i8), i4)


def mad_hi_sat(a, b, c):
    """mad.hi.sat.s32: the upper half of a product plus c, at most at the limits of its type."""
    return add_sat(mul_hi(a, b), c)


def sad(a, b, c):
    """c + |a - b|."""
    return c + np.where(a < b, b - a, a - b)


# ---- quotients


def udiv(a, b):
    """The quotient; by zero, which PTX leaves open, all ones."""
    if b.all():
        return a // b
    zero = b == 0
    return np.where(zero, ~b.dtype.type(0), a // np.where(zero, b.dtype.type(1), b))


def urem(a, b):
    """The remainder; by zero, which PTX leaves open, the dividend."""
    return a % b if b.all() else a - np.where(b == 0, b, udiv(a, b) * b)


def sdiv(a, b):
    """The quotient, rounded to zero; by zero, which PTX leaves open, all ones."""
    if b.min() > 0 and a.min() >= 0:
        return a // b
    zero = b == 0
    d = unsigned(np.abs(np.where(zero, b.dtype.type(1), b)))
    q = (unsigned(np.abs(a)) // d).view(a.dtype)
    return np.where(zero, a.dtype.type(-1), np.where((a < 0) != (b < 0), -q, q))


def srem(a, b):
    """The remainder, of the dividend's sign; by zero, which PTX leaves open, the dividend."""
    return a % b if b.min() > 0 and a.min() >= 0 else a - np.where(b == 0, b, sdiv(a, b) * b)


# ---- shifts


def shl(a, amount):
    """Zeros beyond the width. `a` is unsigned."""
    return a << np.minimum(amount, u4(width(a))).astype(a.dtype)


def shr(a, amount):
    """Zeros beyond the width, or copies of the sign."""
    return a >> np.minimum(amount, u4(width(a))).astype(a.dtype)


def funnel_shift(low, high, amount, left, wrap):
    """The upper word of both shifted left, or the lower of both shifted right, by at most 32 or (wrap) modulo 32."""
    n = (amount & u4(31) if wrap else np.minimum(amount, u4(32))).astype(u8)
    pair = (high.astype(u8) << u8(32)) | low
    return ((pair << n) >> u8(32) if left else pair >> n).astype(u4)


# ---- bits


def ones(length, dtype):
    """`length` ones from the lowest bit on; all for lengths beyond the width."""
    bits = dtype(8 * dtype(0).itemsize)
    full = length >= bits
    return np.where(full, ~dtype(0), (dtype(1) << np.where(full, dtype(0), length)) - dtype(1))


def bfe(a, start, length):
    """Bits from `start` on, of operands that count modulo 256; beyond the width zeros, or copies of the highest bit."""
    bits, dtype = width(a), UNSIGNED[a.dtype.itemsize]
    start, length = (start & u4(255)).astype(dtype), (length & u4(255)).astype(dtype)
    field = ones(length, dtype)
    got = (unsigned(a) >> np.minimum(start, dtype(bits))) & field
    if a.dtype.kind == "u":
        return got
    top = np.minimum(start + np.maximum(length, dtype(1)) - dtype(1), dtype(bits - 1))
    negative = ((unsigned(a) >> top) & dtype(1)).astype(bool) & (length != 0)
    inside = field & ones(np.where(start < dtype(bits), dtype(bits) - start, dtype(0)), dtype)
    return np.where(negative, got | ~inside, got).view(a.dtype)


def bfi(a, b, start, length):
    """The lowest `length` bits of `a` in the place of those of `b` from `start` on."""
    dtype = UNSIGNED[a.dtype.itemsize]
    start, length = (start & u4(255)).astype(dtype), (length & u4(255)).astype(dtype)
    place = np.minimum(start, dtype(width(a)))
    field = ones(length, dtype) << place
    return (b & ~field) | ((a << place) & field)


def bit_mask(start, length, wrap):
    """bmsk: `length` ones from `start` on, both modulo 32 (wrap) or at most 32 (clamp)."""
    start, length = (x & u4(31) if wrap else np.minimum(x, u4(32)) for x in (start, length))
    return ones(length, u4) << start


def sign_extend(a, count, wrap):
    """szext: the lowest `count` bits, modulo 32 (wrap) or at most 32 (clamp), extended by zeros or by their sign."""
    count = count & u4(31) if wrap else np.minimum(count, u4(32))
    return np.where(count == 0, a.dtype.type(0), bfe(a, np.zeros_like(count), count))


def popc(a):
    """The number of ones."""
    return np.bitwise_count(a).astype(u4)


def highest(a):
    """The place of the highest bit that is set, all ones for none."""
    if width(a) == 64:
        high = highest((a >> u8(32)).astype(u4))
        return np.where(high != u4(0xFFFFFFFF), high + u4(32), highest(a.astype(u4)))
    return (np.frexp(a.astype(np.float64))[1] - 1).astype(u4)


def clz(a):
    """The number of zeros above the highest one."""
    return u4(width(a) - 1) - highest(a)


def bfind(a, shift_amount=False):
    """The highest bit that is set, or that differs from the sign, or its distance from the top; all ones for none."""
    found = highest(unsigned(np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a))
    return np.where(found == u4(0xFFFFFFFF), found, u4(width(a) - 1) - found) if shift_amount else found


def brev(a):
    """Bits in reverse order."""
    dtype, bits = a.dtype.type, width(a)
    for step, mask in (1, 0x55), (2, 0x33), (4, 0x0F):
        m = dtype(int(f"{mask:02x}" * (bits // 8), 16))
        a = ((a >> dtype(step)) & m) | ((a & m) << dtype(step))
    return a.byteswap()


# Modes of prmt: the bytes that each of the lowest two bits of the third operand stands for.
PERMUTATIONS = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


def prmt(a, b, select, mode=None):
    """Four of the eight bytes of b (above) and a, as they are or, where bit 3 of a place is set, copies of a sign."""
    if mode:
        select = np.array(PERMUTATIONS[mode], u4)[select & u4(3)]
    pool = np.empty((*np.broadcast_shapes(a.shape, b.shape, select.shape), 2), u4)
    pool[..., 0], pool[..., 1] = a, b
    out = np.empty(pool.shape[:-1], u4)
    pool, parts = pool.view(u1), out.view(u1).reshape(*out.shape, 4)
    first = np.arange(0, pool.size, 8).reshape(out.shape)
    for k in range(4):
        place = (select >> u4(4 * k)) & u4(15)
        byte = pool.reshape(-1).take(first + (place & u4(7)))
        if (place & u4(8)).any():
            byte = np.where(place & u4(8), np.where(byte & u1(0x80), u1(255), u1(0)), byte)
        parts[..., k] = byte
    return out


# ---- products of bytes


def _parts(x, dtype, signed):
    """[..., T] of 32 bits -> [..., T, n] of signed or unsigned parts, as int64."""
    parts = np.ascontiguousarray(x).reshape((*x.shape, 1)).view(dtype)
    return parts.view((SIGNED if signed else UNSIGNED)[dtype(0).itemsize]).astype(i8)


def dp4a(a, b, c, signed_a, signed_b):
    """c plus the products of the four bytes of each."""
    return (c.view(u4) + (_parts(a, u1, signed_a) * _parts(b, u1, signed_b)).sum(-1).astype(u4)).view(c.dtype)


def dp2a(a, b, c, signed_a, signed_b, high=False):
    """c plus the products of the two halves of a with two bytes of b, the lower or the upper."""
    pair = _parts(b, u1, signed_b)[..., 2:] if high else _parts(b, u1, signed_b)[..., :2]
    return (c.view(u4) + (_parts(a, u2, signed_a) * pair).sum(-1).astype(u4)).view(c.dtype)
