"""cvt of PTX between all its types, against exact arithmetic and the manual's rules for NaN and what is too large."""

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from exact_numbers import (
    FORMATS,
    UNSIGNED,
    ZERO,
    Format,
    Number,
    assert_same_numbers,
    between_0_and_1,
    flushed,
    is_infinite,
    is_nan,
    samples,
)
from ptx_runner import compute
from test_ptx_integers import arguments, signed

FLOATS = ("f16", "bf16", "f32", "f64")
WHOLE = {
    "rni": round,
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}  # Python rounds halves to the even number


def dtype_of(kind: str) -> type:
    return UNSIGNED[int(kind.lstrip("ebmf")) if kind in FLOATS else int(kind[1:])]


@cache
def values(kind: str, count: int = 200) -> np.ndarray:
    """Numbers of a type, floats that are near integers among them."""
    if kind not in FLOATS:
        return arguments(int(kind[1:]), 1)[0]
    form = FORMATS[kind]
    rng = np.random.default_rng(3)
    sizes = [2 ** int(e) for e in rng.integers(0, 16 if kind == "f16" else 66, count)]
    near = [Fraction(size * int(rng.choice([1, -1]))) + Fraction(int(rng.integers(-6, 7)), 2) for size in sizes]
    near += [Fraction(n, 4) for n in (*range(-20, 21), 508, 512, 1020, 1024)]
    return np.concatenate([samples(kind, 1, count)[0], np.array([form.encode(x) for x in near], dtype_of(kind))])


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_between_floats(to: str, source: str, mode: str) -> None:
    if to == source:
        return
    widens = FORMATS[to].mantissa >= FORMATS[source].mantissa and FORMATS[to].exponent >= FORMATS[source].exponent
    if widens and mode != "rn":
        return
    x, form = values(source), FORMATS[to]
    want = [form.encode(FORMATS[source].decode(v), mode) for v in x.tolist()]
    got = compute(f"cvt.{'' if widens else mode + '.'}{to}.{source} {{d}}, {{a}};", dtype_of(to), x)
    assert_same_numbers(to, got, want, [x], any_nan=to in ("f32", "f64"))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_two_f32_into_a_word(kind: str) -> None:
    x, form = samples("f32", 2), FORMATS[kind]
    want = [form.encode(FORMATS["f32"].decode(v)) for row in zip(x[1].tolist(), x[0].tolist()) for v in row]
    got = compute(f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}};", np.uint32, *x)
    assert_same_numbers(kind, got.view(np.uint16), want, [np.stack(x[::-1], 1).ravel()])
    want = [form.encode(FORMATS["f32"].decode(v), "rz") for row in zip(x[1].tolist(), x[0].tolist()) for v in row]
    got = compute(f"cvt.rz.{kind}x2.f32 {{d}}, {{a}}, {{b}};", np.uint32, *x)
    assert_same_numbers(kind, got.view(np.uint16), want, [np.stack(x[::-1], 1).ravel()])


def positive(x: Number) -> Number:
    """.relu"""
    return x if is_nan(x) or x > 0 else ZERO


def finite(form: Format, bits: int) -> int:
    """.satfinite"""
    size = bits & form.nan
    return bits - size + form.largest if size == form.infinity else bits


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_relu_and_satfinite(kind: str) -> None:
    (x,), form, source = samples("f32", 1), FORMATS[kind], FORMATS["f32"]
    got = compute(f"cvt.rn.relu.{kind}.f32 {{d}}, {{a}};", np.uint16, x)
    assert_same_numbers(kind, got, [form.encode(positive(source.decode(v))) for v in x.tolist()], [x])
    got = compute(f"cvt.rn.satfinite.{kind}.f32 {{d}}, {{a}};", np.uint16, x)
    assert_same_numbers(kind, got, [finite(form, form.encode(source.decode(v))) for v in x.tolist()], [x])
    got = compute(f"cvt.rn.relu.{kind}x2.f32 {{d}}, {{a}}, {{a}};", np.uint32, x)
    want = [form.encode(positive(source.decode(v))) for v in x.tolist()]
    assert_same_numbers(kind, got.view(np.uint16)[::2].copy(), want, [x])


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode: str) -> None:
    """Its bits are the upper ones of a float32; NaN is the canonical one of float32."""
    (x,), form = samples("f32", 1), FORMATS["tf32"]
    want = []
    for v in x.tolist():
        value = FORMATS["f32"].decode(v)
        want.append(0x7FFFFFFF if is_nan(value) else form.encode(value, mode) << 13)
    got = compute(f"cvt.{mode}.tf32.f32 {{d}}, {{a}};", np.uint32, x)
    assert_same_numbers("f32", got, want, [x])
    got = compute(f"cvt.{mode}.satfinite.tf32.f32 {{d}}, {{a}};", np.uint32, x)
    largest, infinity = form.largest << 13, form.infinity << 13
    kept = [bits & 1 << 31 | largest if bits & 0x7FFFFFFF == infinity else bits for bits in want]
    assert_same_numbers("f32", got, kept, [x])
    if mode != "rna":
        got = compute(f"cvt.{mode}.relu.tf32.f32 {{d}}, {{a}};", np.uint32, x)
        assert_same_numbers("f32", got, [0 if bits >> 31 else bits for bits in want], [x])


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_8_bit_floats(kind: str) -> None:
    form, source = FORMATS[kind], FORMATS["f32"]
    every = np.arange(256, dtype=np.uint16)
    codes = every | every[::-1] << np.uint16(8)
    got = compute(f"cvt.rn.f16x2.{kind}x2 {{d}}, {{a}};", np.uint32, codes).view(np.uint16)
    want = [FORMATS["f16"].encode(form.decode(v)) for v in codes.view(np.uint8).tolist()]
    assert_same_numbers("f16", got, want, [codes.view(np.uint8)])
    got = compute(f"cvt.rn.relu.f16x2.{kind}x2 {{d}}, {{a}};", np.uint32, codes).view(np.uint16)
    want = [FORMATS["f16"].encode(positive(form.decode(v))) for v in codes.view(np.uint8).tolist()]
    assert_same_numbers("f16", got, want, [codes.view(np.uint8)])

    def rounded(x: Number) -> int:
        bits = form.encode(x)
        return bits if is_nan(x) else (bits & 128) | min(bits & 127, form.largest)

    numbers = [Fraction(n, 2**k) for n in range(-40, 40) for k in (0, 3, 7, 10, 17)] + [
        Fraction(n * 8) for n in range(-70, 70)
    ]
    x = np.concatenate([np.array([source.encode(n) for n in numbers], np.uint32), samples("f32", 1)[0]])
    x = x[: len(x) // 2 * 2]
    low, high = x[::2].copy(), x[1::2].copy()
    got = compute(f"cvt.rn.satfinite.{kind}x2.f32 {{d}}, {{a}}, {{b}};", np.uint16, high, low).view(np.uint8)
    want = [rounded(source.decode(v)) for v in x.tolist()]
    assert_same_numbers(kind, got, want, [x])
    halves = samples("f16", 1)[0]
    halves = halves[: len(halves) // 2 * 2]
    got = compute(f"cvt.rn.satfinite.{kind}x2.f16x2 {{d}}, {{a}};", np.uint16, halves.view(np.uint32)).view(np.uint8)
    assert_same_numbers(kind, got, [rounded(FORMATS["f16"].decode(v)) for v in halves.tolist()], [halves])


def to_integer(x: Number, to: str, source: str, whole: str) -> int:
    """Saturates. NaN is 0, or the highest bit alone where f64 or 64 bits take part (the manual's note to cvt)."""
    bits, sign = int(to[1:]), to[0] == "s"
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if sign else (0, (1 << bits) - 1)
    if is_nan(x):
        return 1 << (bits - 1) if source == "f64" or bits == 64 else 0
    if is_infinite(x):
        return high if x > 0 else low
    return max(low, min(high, WHOLE[whole](x)))


@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
def test_floats_to_integers_saturate(source: str, to: str) -> None:
    bits, x = int(to[1:]), values(source, 60)
    for whole in WHOLE:
        got = compute(f"cvt.{whole}.{to}.{source} {{d}}, {{a}};", UNSIGNED[max(16, bits)], x)
        for a, b in zip(x.tolist(), got.tolist()):
            want = to_integer(FORMATS[source].decode(a), to, source, whole)
            assert b & ((1 << bits) - 1) == want & ((1 << bits) - 1), (whole, hex(a), hex(b), want)


@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_to_floats_round_once(source: str, to: str) -> None:
    bits, form = int(source[1:]), FORMATS[to]
    x = arguments(max(bits, 16), 1)[0][::2].copy()
    if bits >= 32:
        ties = [(1 << k) + d for k in range(8, bits - 1) for d in (1, 3, (1 << max(k - form.mantissa - 1, 0)) + 1)]
        x = np.concatenate([x, np.array(ties, object).astype(x.dtype)])
    for mode in ("rn", "rz", "rm", "rp") if to in ("f32", "f16") else ("rn",):
        got = compute(f"cvt.{mode}.{to}.{source} {{d}}, {{a}};", dtype_of(to), x)
        numbers = [signed(v, bits) if source[0] == "s" else v & ((1 << bits) - 1) for v in x.tolist()]
        assert_same_numbers(to, got, [form.encode(Fraction(v), mode) for v in numbers], [x])


@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_between_integers(source: str, to: str) -> None:
    """Sign or zero extension, truncation, or .sat; a register that is wider than the type is filled by its sign."""
    bits, width, register = int(source[1:]), int(to[1:]), UNSIGNED[max(16, int(to[1:]))]
    x = arguments(max(bits, 16), 1)[0][::2].copy()
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    for sat in ("", ".sat"):
        got = compute(f"cvt{sat}.{to}.{source} {{d}}, {{a}};", register, x)
        for a, b in zip(x.tolist(), got.tolist()):
            value = signed(a, bits) if source[0] == "s" else a & ((1 << bits) - 1)
            value = max(low, min(high, value)) if sat else value
            want = signed(value, width) if to[0] == "s" else value & ((1 << width) - 1)
            assert b == want & int(np.iinfo(register).max), (sat, hex(a), hex(b), want)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_to_whole_numbers_of_the_same_type(kind: str) -> None:
    x, form = values(kind, 100), FORMATS[kind]
    for whole, function in WHOLE.items():

        def one(v: int) -> int:
            number = form.decode(v)
            if is_nan(number) or is_infinite(number) or number == 0:
                return form.encode(number)
            n = function(number)  # noqa: B023
            return form.encode(Fraction(n)) if n else form.encode(-0.0 if number < 0 else ZERO)

        got = compute(f"cvt.{whole}.{kind}.{kind} {{d}}, {{a}};", dtype_of(kind), x)
        assert_same_numbers(kind, got, [one(v) for v in x.tolist()], [x], any_nan=True)


def test_sat_and_ftz() -> None:
    (x,), form, half = samples("f32", 1), FORMATS["f32"], FORMATS["f16"]
    got = compute("cvt.sat.f32.f32 {d}, {a};", np.uint32, x)
    assert_same_numbers("f32", got, [form.encode(between_0_and_1(form.decode(v))) for v in x.tolist()], [x])
    got = compute("cvt.rn.sat.f16.f32 {d}, {a};", np.uint16, x)
    assert_same_numbers("f16", got, [half.encode(between_0_and_1(form.decode(v))) for v in x.tolist()], [x])
    got = compute("cvt.rpi.ftz.s32.f32 {d}, {a};", np.uint32, x)
    want = [to_integer(flushed(form.decode(v), form), "s32", "f32", "rpi") & 0xFFFFFFFF for v in x.tolist()]
    assert got.tolist() == want
    (wide,), f64 = samples("f64", 1), FORMATS["f64"]
    tiny = np.array([f64.encode(Fraction(n, 2**140)) for n in range(-9, 9)], np.uint64)
    wide = np.concatenate([wide, tiny])
    got = compute("cvt.rn.ftz.f32.f64 {d}, {a};", np.uint32, wide)
    want = [form.encode(flushed(form.decode(form.encode(f64.decode(v))), form)) for v in wide.tolist()]
    assert_same_numbers("f32", got, want, [wide], any_nan=True)
