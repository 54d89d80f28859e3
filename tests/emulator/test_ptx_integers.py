"""Integer and bit instructions of PTX, against their definitions in the manual with Python's integers."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from exact_numbers import UNSIGNED
from ptx_runner import compute

ONES = 0xFFFFFFFF


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


@cache
def arguments(bits: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """Edges beside edges, and random numbers of every size."""
    top = 1 << (bits - 1)
    few = np.array(
        [0, 1, 2, 3, 7, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, top // 2, 0x89ABCDEF & (2 * top - 1)], object
    )
    rng = np.random.default_rng(seed)
    rows = rng.choice(few, (150, count)).tolist()
    for _ in range(150):
        rows.append([int(rng.integers(0, 2**63)) * 2 + 1 >> int(rng.integers(64 - bits, 64)) for _ in range(count)])
    for row in rows[::3]:
        row[0] = -row[0] & (2 * top - 1)
    return [np.array(column, object).astype(UNSIGNED[bits]) for column in zip(*rows)]


def check(
    code: str, bits: int, function: Callable[..., int], x: list[np.ndarray], result: int = 0, sign: bool = False
) -> None:
    """The instruction gives `function` of the integers, modulo its width; the result has `result` bits, or as many."""
    result = result or bits
    got = compute(code, UNSIGNED[result], *x)
    for *values, bits_of_it in zip(*(v.tolist() for v in x), got.tolist()):
        given = [signed(v, w.itemsize * 8) if sign else v for v, w in zip(values, x)]
        want = function(*given) & ((1 << result) - 1)
        assert bits_of_it == want, f"{code} of {[hex(v) for v in values]}: {bits_of_it:#x}, not {want:#x}"


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_arithmetic_wraps(kind: str) -> None:
    bits, sign = int(kind[1:]), kind[0] == "s"
    a, b, c = arguments(bits, 3)
    two, three = "{d}, {a}, {b};", "{d}, {a}, {b}, {c};"
    check(f"add.{kind} {two}", bits, lambda x, y: x + y, [a, b], sign=sign)
    check(f"sub.{kind} {two}", bits, lambda x, y: x - y, [a, b], sign=sign)
    check(f"mul.lo.{kind} {two}", bits, lambda x, y: x * y, [a, b], sign=sign)
    check(f"mul.hi.{kind} {two}", bits, lambda x, y: x * y >> bits, [a, b], sign=sign)
    check(f"mad.lo.{kind} {three}", bits, lambda x, y, z: x * y + z, [a, b, c], sign=sign)
    check(f"mad.hi.{kind} {three}", bits, lambda x, y, z: (x * y >> bits) + z, [a, b, c], sign=sign)
    check(f"min.{kind} {two}", bits, min, [a, b], sign=sign)
    check(f"max.{kind} {two}", bits, max, [a, b], sign=sign)
    check(f"sad.{kind} {three}", bits, lambda x, y, z: z + abs(x - y), [a, b, c], sign=sign)
    if bits < 64:
        check(f"mul.wide.{kind} {two}", bits, lambda x, y: x * y, [a, b], 2 * bits, sign)
        wide = arguments(2 * bits, 1, 1)
        check(f"mad.wide.{kind} {three}", bits, lambda x, y, z: x * y + z, [a, b, *wide], 2 * bits, sign)
    if sign:
        check(f"neg.{kind} {{d}}, {{a}};", bits, lambda x: -x, [a], sign=True)
        check(f"abs.{kind} {{d}}, {{a}};", bits, lambda x: abs(x), [a], sign=True)
    divisor = np.where(b == 0, b.dtype.type(3), b)
    check(f"div.{kind} {two}", bits, towards_zero, [a, divisor], sign=sign)
    check(f"rem.{kind} {two}", bits, lambda x, y: x - towards_zero(x, y) * y, [a, divisor], sign=sign)


def test_division_by_zero_is_no_error() -> None:
    a = np.arange(8, dtype=np.uint32)
    for name in ("div.u32", "div.s32", "rem.u32", "rem.s32"):
        assert len(compute(f"{name} {{d}}, {{a}}, {{b}};", np.uint32, a, a * np.uint32(0))) == 8


def clamp(x: int) -> int:
    return max(-(2**31), min(2**31 - 1, x))


def test_saturating_arithmetic() -> None:
    a, b, c = arguments(32, 3)
    check("add.sat.s32 {d}, {a}, {b};", 32, lambda x, y: clamp(x + y), [a, b], sign=True)
    check("sub.sat.s32 {d}, {a}, {b};", 32, lambda x, y: clamp(x - y), [a, b], sign=True)
    check("mad.hi.sat.s32 {d}, {a}, {b}, {c};", 32, lambda x, y, z: clamp((x * y >> 32) + z), [a, b, c], sign=True)
    check("min.relu.s32 {d}, {a}, {b};", 32, lambda x, y: max(0, min(x, y)), [a, b], sign=True)
    check("max.relu.s32 {d}, {a}, {b};", 32, lambda x, y: max(0, max(x, y)), [a, b], sign=True)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_24_bits(kind: str) -> None:
    a, b, c = arguments(32, 3)
    sign = kind == "s32"

    def product(x: int, y: int) -> int:
        x, y = (signed(v, 24) if sign else v & 0xFFFFFF for v in (x, y))
        return x * y

    check(f"mul24.lo.{kind} {{d}}, {{a}}, {{b}};", 32, product, [a, b])
    check(f"mul24.hi.{kind} {{d}}, {{a}}, {{b}};", 32, lambda x, y: product(x, y) >> 16, [a, b])
    check(f"mad24.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", 32, lambda x, y, z: product(x, y) + z, [a, b, c])
    check(f"mad24.hi.{kind} {{d}}, {{a}}, {{b}}, {{c}};", 32, lambda x, y, z: (product(x, y) >> 16) + z, [a, b, c])


@pytest.mark.parametrize("kind_b", ["u32", "s32"])
@pytest.mark.parametrize("kind_a", ["u32", "s32"])
def test_products_of_bytes(kind_a: str, kind_b: str) -> None:
    def parts(x: int, bits: int, kind: str) -> list[int]:
        fields = [x >> n & ((1 << bits) - 1) for n in range(0, 32, bits)]
        return [signed(v, bits) for v in fields] if kind == "s32" else fields

    def dot(a: list[int], b: list[int]) -> int:
        return sum(x * y for x, y in zip(a, b))

    x = arguments(32, 3)
    operands = f"{kind_a}.{kind_b} {{d}}, {{a}}, {{b}}, {{c}};"
    check(f"dp4a.{operands}", 32, lambda a, b, c: c + dot(parts(a, 8, kind_a), parts(b, 8, kind_b)), x)
    check(f"dp2a.lo.{operands}", 32, lambda a, b, c: c + dot(parts(a, 16, kind_a), parts(b, 8, kind_b)[:2]), x)
    check(f"dp2a.hi.{operands}", 32, lambda a, b, c: c + dot(parts(a, 16, kind_a), parts(b, 8, kind_b)[2:]), x)


def test_sums_and_products_by_way_of_a_carry() -> None:
    a, b = arguments(64, 2)
    c, d = arguments(32, 2)
    count = len(c)
    halves = "mov.b64 {{ %r100, %r101 }}, {a}; mov.b64 {{ %r102, %r103 }}, {b}; "
    end = "mov.b64 {d}, {{ %r104, %r105 }};"
    code = halves + "add.cc.u32 %r104, %r100, %r102; addc.u32 %r105, %r101, %r103; " + end
    check(code, 64, lambda x, y: x + y, [a, b])
    code = halves + "sub.cc.u32 %r104, %r100, %r102; subc.u32 %r105, %r101, %r103; " + end
    check(code, 64, lambda x, y: x - y, [a, b])
    third = "add.cc.u32 %r104, %r100, %r102; addc.cc.u32 %r105, %r101, %r103; addc.u32 {d}, 0, 0;"
    check(halves + third, 64, lambda x, y: (x + y) >> 64, [a, b], 32)
    third = "sub.cc.u32 %r104, %r100, %r102; subc.cc.u32 %r105, %r101, %r103; subc.u32 {d}, 0, 0;"
    check(halves + third, 64, lambda x, y: (x - y) >> 64, [a, b], 32)
    code = "mov.b64 {{ %r100, %r101 }}, {c}; mad.lo.cc.u32 %r104, {a}, {b}, %r100; madc.hi.u32 %r105, {a}, {b}, %r101; "
    check(code + end, 64, lambda x, y, z: x * y + z, [c, d, a[:count]])
    product = "mad.lo.cc.u32 %r104, {a}, {b}, %r100; madc.hi.cc.u32 %r105, {a}, {b}, %r101; addc.u32 {d}, 0, 0;"
    check("mov.b64 {{ %r100, %r101 }}, {c}; " + product, 64, lambda x, y, z: (x * y + z) >> 64, [c, d, a[:count]], 32)


# ---- bits


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int) -> None:
    a, b = arguments(bits, 2)
    for name, function in {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}.items():
        check(f"{name}.b{bits} {{d}}, {{a}}, {{b}};", bits, function, [a, b])
    check(f"not.b{bits} {{d}}, {{a}};", bits, lambda x: ~x, [a])
    check(f"cnot.b{bits} {{d}}, {{a}};", bits, lambda x: x == 0, [a])


def test_logic_of_predicates() -> None:
    a, b = (v & np.uint32(1) for v in arguments(32, 2))
    setup = "setp.ne.u32 %p1, {a}, 0; setp.ne.u32 %p2, {b}, 0; "
    check(setup + "and.pred %p0, %p1, %p2;", 32, int.__and__, [a, b])
    check(setup + "or.pred %p0, %p1, %p2;", 32, int.__or__, [a, b])
    check(setup + "xor.pred %p0, %p1, %p2;", 32, int.__xor__, [a, b])
    check(setup + "not.pred %p0, %p1;", 32, lambda x, y: x ^ 1, [a, b])
    check(setup + "and.pred %p0, %p1, !%p2;", 32, lambda x, y: x & (y ^ 1), [a, b])
    check(setup + "mov.pred %p0, %p2;", 32, lambda x, y: y, [a, b])


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_past_the_width(bits: int) -> None:
    (a,) = arguments(bits, 1)
    n = np.resize(np.array([0, 1, 5, bits - 1, bits, bits + 1, 33, 65, 255, 256, 2**31, ONES], np.uint32), len(a))
    check(f"shl.b{bits} {{d}}, {{a}}, {{b}};", bits, lambda x, k: x << min(k, bits), [a, n])
    check(f"shr.u{bits} {{d}}, {{a}}, {{b}};", bits, lambda x, k: x >> min(k, bits), [a, n])
    check(f"shr.b{bits} {{d}}, {{a}}, {{b}};", bits, lambda x, k: x >> min(k, bits), [a, n])
    check(f"shr.s{bits} {{d}}, {{a}}, {{b}};", bits, lambda x, k: signed(x, bits) >> min(k, bits), [a, n])
    for k in (0, 3, bits - 1, bits, 200):
        check(f"shl.b{bits} {{d}}, {{a}}, {k};", bits, lambda x, k=k: x << k, [a])
        check(f"shr.s{bits} {{d}}, {{a}}, {k};", bits, lambda x, k=k: signed(x, bits) >> k, [a])
        check(f"shr.u{bits} {{d}}, {{a}}, {k};", bits, lambda x, k=k: x >> k, [a])


def test_funnel_shifts() -> None:
    a, b = arguments(32, 2)
    n = np.resize(np.array([0, 1, 7, 31, 32, 33, 64, 255, ONES], np.uint32), len(a))
    for mode, count in {"wrap": lambda k: k & 31, "clamp": lambda k: min(k, 32)}.items():
        operands = "{d}, {a}, {b}, {c};"
        left = lambda x, y, k, count=count: ((y << 32 | x) << count(k)) >> 32  # noqa: E731
        right = lambda x, y, k, count=count: (y << 32 | x) >> count(k)  # noqa: E731
        check(f"shf.l.{mode}.b32 {operands}", 32, left, [a, b, n])
        check(f"shf.r.{mode}.b32 {operands}", 32, right, [a, b, n])
    check("shf.l.wrap.b32 {d}, {a}, {b}, 12;", 32, lambda x, y: (y << 32 | x) << 12 >> 32, [a, b])
    check("shf.r.wrap.b32 {d}, {a}, {b}, 12;", 32, lambda x, y: (y << 32 | x) >> 12, [a, b])


def extracted(a: int, at: int, count: int, bits: int, sign: bool) -> int:
    """bfe, as the manual's program computes it."""
    at, count, top = at & 255, count & 255, bits - 1
    fill = 0 if not sign or count == 0 else a >> min(at + count - 1, top) & 1
    return sum((a >> (at + n) & 1 if n < count and at + n <= top else fill) << n for n in range(bits))


def inserted(a: int, b: int, at: int, count: int, bits: int) -> int:
    """bfi, as the manual's program computes it."""
    at, count = at & 255, count & 255
    for n in range(count):
        if at + n < bits:
            b = b & ~(1 << (at + n)) | (a >> n & 1) << (at + n)
    return b


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits: int) -> None:
    a, b = arguments(bits, 2)
    rng = np.random.default_rng(1)
    places = np.array([0, 1, 5, 16, bits - 1, bits, 31, 33, 200, 256 + 3], np.uint32)
    at, count = rng.choice(places, (2, len(a)))
    for kind in (f"u{bits}", f"s{bits}"):
        sign = kind[0] == "s"
        check(
            f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};",
            bits,
            lambda x, p, n: extracted(x, p, n, bits, sign),  # noqa: B023
            [a, at, count],
        )
        for p, n in ((0, 8), (5, 0), (24, 8), (28, 8), (bits - 1, 1), (0, bits), (bits, 4)):
            check(f"bfe.{kind} {{d}}, {{a}}, {p}, {n};", bits, lambda x: extracted(x, p, n, bits, sign), [a])  # noqa: B023
    check(
        f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", bits,
        lambda x, y, p, n: inserted(x, y, p, n, bits), [a, b, at, count],
    )  # fmt: skip
    for p, n in ((0, 8), (5, 0), (24, 8), (28, 8), (bits - 1, 1), (0, bits), (bits, 4)):
        check(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {p}, {n};", bits, lambda x, y: inserted(x, y, p, n, bits), [a, b])  # noqa: B023


def test_masks_and_extensions_of_bits() -> None:
    (a,) = arguments(32, 1)
    places = np.array([0, 1, 5, 16, 31, 32, 33, 64, ONES], np.uint32)
    at, count = np.random.default_rng(0).choice(places, (2, len(a)))
    for mode, limit in {"wrap": lambda k: k & 31, "clamp": lambda k: min(k, 32)}.items():
        mask = lambda p, n, limit=limit: ((1 << limit(n)) - 1) << limit(p)  # noqa: E731
        check(f"bmsk.{mode}.b32 {{d}}, {{a}}, {{b}};", 32, mask, [at, count])
        short = lambda x, n, limit=limit: x & ((1 << limit(n)) - 1)  # noqa: E731
        check(f"szext.{mode}.u32 {{d}}, {{a}}, {{b}};", 32, short, [a, count])
        long = lambda x, n, limit=limit: signed(x, limit(n)) if limit(n) else 0  # noqa: E731
        check(f"szext.{mode}.s32 {{d}}, {{a}}, {{b}};", 32, long, [a, count])


@pytest.mark.parametrize("bits", [32, 64])
def test_counts(bits: int) -> None:
    (a,) = arguments(bits, 1)
    none = ONES

    def top(x: int) -> int:
        return x.bit_length() - 1 if x else none

    def top_signed(x: int) -> int:
        return top(~x if x < 0 else x)

    def distance(found: int) -> int:
        return found if found == none else bits - 1 - found

    check(f"popc.b{bits} {{d}}, {{a}};", bits, int.bit_count, [a], 32)
    check(f"clz.b{bits} {{d}}, {{a}};", bits, lambda x: bits - x.bit_length(), [a], 32)
    check(f"brev.b{bits} {{d}}, {{a}};", bits, lambda x: int(f"{x:0{bits}b}"[::-1], 2), [a])
    check(f"bfind.u{bits} {{d}}, {{a}};", bits, top, [a], 32)
    check(f"bfind.s{bits} {{d}}, {{a}};", bits, top_signed, [a], 32, sign=True)
    check(f"bfind.shiftamt.u{bits} {{d}}, {{a}};", bits, lambda x: distance(top(x)), [a], 32)
    check(f"bfind.shiftamt.s{bits} {{d}}, {{a}};", bits, lambda x: distance(top_signed(x)), [a], 32, sign=True)


def test_lop3_has_every_table() -> None:
    """0xf0, 0xcc and 0xaa stand for the operands in a table; its result for them is the table itself."""
    a, b, c = (np.full(1, int(f"{x:02x}" * 4, 16), np.uint32) for x in (0xF0, 0xCC, 0xAA))
    tables = np.arange(256)
    code = "mov.b32 {d}, 0;\n" + "\n".join(
        f"lop3.b32 %r100, {{a}}, {{b}}, {{c}}, {t}; setp.ne.u32 %p1, %r100, {int(f'{t:02x}' * 4, 16)};"
        f"@%p1 mov.b32 {{d}}, {t + 1};"
        for t in tables
    )
    assert compute(code, np.uint32, a, b, c)[0] == 0
    a, b, c = arguments(32, 3)
    check("lop3.b32 {d}, {a}, {b}, {c}, 0x96;", 32, lambda x, y, z: x ^ y ^ z, [a, b, c])
    check(
        "lop3.b32 {d}, {a}, {b}, {c}, 0x1b;",
        32,
        lambda x, y, z: (~x & ~y) & ~z | ~x & ~y & z | ~x & y & z | x & ~y & ~z,
        [a, b, c],
    )


def permuted(a: int, b: int, select: int) -> int:
    pool, out = b << 32 | a, 0
    for n in range(4):
        place = select >> 4 * n & 15
        byte = pool >> 8 * (place & 7) & 255
        out |= ((255 if byte & 128 else 0) if place & 8 else byte) << 8 * n
    return out


PERMUTATIONS = {  # bytes 3, 2, 1, 0 of the result for selectors 0, 1, 2, 3: table of the manual
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


def test_byte_permutations() -> None:
    a, b, select = arguments(32, 3)
    check("prmt.b32 {d}, {a}, {b}, {c};", 32, permuted, [a, b, select])
    for constant in (
        0x5410,
        0x7632,
        0x3210,
        0x7654,
        0x0123,
        0x4567,
        0x6420,
        0x7531,
        0xBA98,
        0x8D01,
        0xFFFF,
        0x4440,
        0x1032,
    ):
        check(f"prmt.b32 {{d}}, {{a}}, {{b}}, {constant:#x};", 32, lambda x, y: permuted(x, y, constant), [a, b])  # noqa: B023
    for mode, tables in PERMUTATIONS.items():
        choose = lambda x, y, s, tables=tables: permuted(x, y, int(tables[s & 3], 16))  # noqa: E731
        check(f"prmt.b32.{mode} {{d}}, {{a}}, {{b}}, {{c}};", 32, choose, [a, b, select])
        check(f"prmt.b32.{mode} {{d}}, {{a}}, {{b}}, 2;", 32, lambda x, y: choose(x, y, 2), [a, b])  # noqa: B023
