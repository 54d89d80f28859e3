"""Floating-point instructions of PTX, against exact arithmetic by the definitions of IEEE 754 and the PTX manual."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from exact_numbers import (
    FORMATS,
    UNSIGNED,
    ZERO,
    Number,
    assert_same_numbers,
    between_0_and_1,
    edges,
    expected,
    flushed,
    fused,
    is_nan,
    minus,
    over,
    plus,
    root,
    samples,
    sign_of,
    times,
    zero,
)
from ptx_runner import compute

TERMS = {"add": plus, "sub": minus, "mul": times, "fma": fused, "div": over, "sqrt": root}
COUNT = {"add": 2, "sub": 2, "mul": 2, "fma": 3, "div": 2, "sqrt": 1, "rcp": 1}
MODES = ("rn", "rz", "rm", "rp")


def written(name: str, count: int) -> str:
    return f"{name} {{d}}, {', '.join(['{a}', '{b}', '{c}'][:count])};"


def dtype_of(kind: str) -> type:
    return UNSIGNED[FORMATS[kind].bits]


def moded(function: Callable[..., Number], mode: str) -> Callable[..., Number]:
    """A sum's sign of zero depends on the mode."""
    return (lambda *x: function(*x, mode)) if function in (plus, minus, fused) else function


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma", "div", "sqrt", "rcp"])
def test_every_mode_rounds_once(name: str, kind: str, mode: str) -> None:
    x = samples(kind, COUNT[name], 200 if kind == "f32" else 100)
    function = (lambda v: over(Fraction(1), v)) if name == "rcp" else moded(TERMS[name], mode)
    got = compute(written(f"{name}.{mode}.{kind}", COUNT[name]), dtype_of(kind), *x)
    assert_same_numbers(kind, got, expected(kind, function, x, mode), x, any_nan=True)


def test_default_rounding_of_sums_and_products() -> None:
    x = samples("f32", 2)
    for name in ("add", "sub", "mul"):
        got = compute(written(f"{name}.f32", 2), np.uint32, *x)
        assert_same_numbers("f32", got, expected("f32", TERMS[name], x), x, any_nan=True)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f64"])
def test_fused_products_in_the_middle_of_two_numbers(kind: str) -> None:
    """A summand too small for a wider format to hold it beside the product still decides the rounding."""
    form = FORMATS[kind]
    half, least = Fraction(1, 2 ** ((form.mantissa + 1) // 2)), Fraction(2) ** (1 - form.bias - form.mantissa)
    rest = Fraction(1, 2 ** (form.mantissa + 1)) / half  # half * rest is half a unit of the last place
    rows = []
    for m in (1, 3, 5, 7):
        a, b = 1 + half, 1 + m * rest
        assert (a * b * 2 ** (form.mantissa + 1)) % 2 == 1
        for scale in (Fraction(1), Fraction(4), Fraction(1, 2)):
            for tiny in (least, least * 2**5, Fraction(0)):
                rows += [(s * a * scale, b, t * tiny) for s in (1, -1) for t in (1, -1)]
    x = [np.array([form.encode(Fraction(v)) for v in column], dtype_of(kind)) for column in zip(*rows)]
    got = compute(written(f"fma.rn.{kind}", 3), dtype_of(kind), *x)
    assert_same_numbers(kind, got, expected(kind, fused, x), x)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_ftz_flushes_arguments_and_results(name: str) -> None:
    form, x = FORMATS["f32"], samples("f32", COUNT[name], 300)

    def one(*values: Number) -> Number:
        exact = TERMS[name](*(flushed(v, form) for v in values))
        return flushed(form.decode(form.encode(exact)), form)

    got = compute(written(f"{name}.rn.ftz.f32" if name == "fma" else f"{name}.ftz.f32", COUNT[name]), np.uint32, *x)
    assert_same_numbers("f32", got, expected("f32", one, x), x, any_nan=True)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_sat_clamps_and_takes_nan_as_zero(name: str, kind: str) -> None:
    form, x = FORMATS[kind], samples(kind, COUNT[name], 200)
    got = compute(written(f"{name}.rn.sat.{kind}", COUNT[name]), dtype_of(kind), *x)

    def one(*values: Number) -> Number:
        return between_0_and_1(form.decode(form.encode(TERMS[name](*values))))

    assert_same_numbers(kind, got, expected(kind, one, x), x)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precisions_round_once(name: str, kind: str) -> None:
    x = samples(kind, COUNT[name])
    want = expected(kind, TERMS[name], x)
    got = compute(written(f"{name}.rn.{kind}", COUNT[name]), np.uint16, *x)
    assert_same_numbers(kind, got, want, x)
    even = [v[: len(v) // 2 * 2] for v in x]
    packed = compute(written(f"{name}.rn.{kind}x2", COUNT[name]), np.uint32, *(v.view(np.uint32) for v in even))
    assert_same_numbers(kind, packed.view(np.uint16), want[: len(even[0])], even)


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_two_f32_in_a_register(name: str) -> None:
    x = [v[: len(v) // 2 * 2] for v in samples("f32", COUNT[name])]
    got = compute(
        written(f"{name}.rn.f32x2", COUNT[name]), np.uint64, *(v.view(np.uint64) for v in x), target="sm_100a"
    )
    assert_same_numbers("f32", got.view(np.uint32), expected("f32", TERMS[name], x), x, any_nan=True)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_fma_relu(kind: str) -> None:
    form, x = FORMATS[kind], samples(kind, 3)

    def one(a: Number, b: Number, c: Number) -> Number:
        rounded = form.decode(form.encode(fused(a, b, c)))
        return rounded if is_nan(rounded) or rounded > 0 else ZERO

    got = compute(written(f"fma.rn.relu.{kind}", 3), np.uint16, *x)
    assert_same_numbers(kind, got, expected(kind, one, x), x)


def lesser(x: Number, y: Number, largest: bool = False) -> Number:
    """min and max: a number rather than NaN, -0 before +0."""
    if is_nan(x) or is_nan(y):
        return y if is_nan(x) else x
    if x == y:
        first = (sign_of(x) < sign_of(y)) != largest
        return x if first else y
    return x if (x < y) != largest else y


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_minima_and_maxima(name: str, kind: str) -> None:
    form, x = FORMATS[kind], samples(kind, 2, 300)

    def plain(a: Number, b: Number) -> Number:
        return lesser(a, b, name == "max")

    def strict(a: Number, b: Number) -> Number:
        return math.nan if is_nan(a) or is_nan(b) else plain(a, b)

    got = compute(written(f"{name}.{kind}", 2), dtype_of(kind), *x)
    assert_same_numbers(kind, got, expected(kind, plain, x), x)
    if kind == "f64":
        return
    got = compute(written(f"{name}.NaN.{kind}", 2), dtype_of(kind), *x)
    assert_same_numbers(kind, got, expected(kind, strict, x), x)

    def magnitudes(a: Number, b: Number) -> Number:
        size = plain(*(math.nan if is_nan(v) else zero(1) if v == 0 else abs(v) for v in (a, b)))
        return size if is_nan(size) else times(size, Fraction(int(sign_of(a) * sign_of(b))))

    numbers = [np.array(v) for v in zip(*(row for row in zip(*x) if not any(is_nan(form.decode(int(v))) for v in row)))]
    got = compute(written(f"{name}.xorsign.abs.{kind}", 2), dtype_of(kind), *numbers)
    assert_same_numbers(kind, got, expected(kind, magnitudes, numbers), numbers)
    if kind == "f32":
        flush = compute(written(f"{name}.ftz.f32", 2), np.uint32, *x)
        want = expected(kind, lambda a, b: plain(flushed(a, form), flushed(b, form)), x)
        assert_same_numbers(kind, flush, want, x)
    else:
        both = compute(
            written(f"{name}.NaN.{kind}x2", 2), np.uint32, *(v[: len(v) // 2 * 2].view(np.uint32) for v in x)
        )
        want = expected(kind, strict, [v[: len(v) // 2 * 2] for v in x])
        assert_same_numbers(kind, both.view(np.uint16), want, x)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_neg_and_abs_change_only_the_sign(kind: str) -> None:
    (x,) = samples(kind, 1, 100)
    top = x.dtype.type(1 << (FORMATS[kind].bits - 1))
    x = x[[not is_nan(FORMATS[kind].decode(v)) for v in x.tolist()]]
    assert (compute(written(f"neg.{kind}", 1), x.dtype, x) == x ^ top).all()
    assert (compute(written(f"abs.{kind}", 1), x.dtype, x) == x & ~top).all()
    if kind in ("f16", "bf16"):
        x = x[: len(x) // 2 * 2]
        assert (compute(written(f"neg.{kind}x2", 1), np.uint32, x.view(np.uint32)).view(np.uint16) == x ^ top).all()


def test_copysign_takes_the_sign_of_the_first() -> None:
    x, y = samples("f32", 2, 100)
    want = (x & np.uint32(0x80000000)) | (y & np.uint32(0x7FFFFFFF))
    assert (compute("copysign.f32 {d}, {a}, {b};", np.uint32, x, y) == want).all()


def test_testp() -> None:
    (x,) = samples("f32", 1, 100)
    size = x & np.uint32(0x7FFFFFFF)
    classes = {
        "finite": size < 0x7F800000,
        "infinite": size == 0x7F800000,
        "number": size <= 0x7F800000,
        "notanumber": size > 0x7F800000,
        "normal": ((size >= 0x800000) & (size < 0x7F800000)) | (size == 0),
        "subnormal": (size < 0x800000) & (size > 0),
    }
    for name, want in classes.items():
        assert (compute(f"testp.{name}.f32 %p0, {{a}};", np.uint32, x) == want).all(), name


APPROXIMATE = {  # name -> (the function, largest relative error, largest absolute error in the manual)
    "ex2": (lambda v: 2.0**v, 2**-22, 0.0),
    "lg2": (math.log2, 2**-22, 2**-22),
    "rcp": (lambda v: 1 / v, 2**-23, 0.0),
    "sqrt": (math.sqrt, 2**-23, 0.0),
    "rsqrt": (lambda v: 1 / math.sqrt(v), 2**-22.9, 0.0),
    "sin": (math.sin, 0.0, 2**-20.5),
    "cos": (math.cos, 0.0, 2**-20.5),
    "tanh": (math.tanh, 2**-11, 0.0),
}
INF, NAN = math.inf, math.nan
SPECIAL = {  # argument -> result, tables of the manual
    "ex2": [(-INF, 0.0), (-0.0, 1.0), (0.0, 1.0), (INF, INF), (NAN, NAN), (128.0, INF), (-200.0, 0.0)],
    "lg2": [(-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, -INF), (INF, INF), (NAN, NAN)],
    "rcp": [(-INF, -0.0), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN)],
    "sqrt": [(-INF, NAN), (-1.0, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, INF), (NAN, NAN)],
    "rsqrt": [(-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN)],
    "sin": [(-INF, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, NAN), (NAN, NAN)],
    "cos": [(-INF, NAN), (-0.0, 1.0), (0.0, 1.0), (INF, NAN), (NAN, NAN)],
    "tanh": [(-INF, -1.0), (-0.0, -0.0), (0.0, 0.0), (INF, 1.0), (NAN, NAN)],
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_are_within_their_bounds(name: str) -> None:
    function, relative, absolute = APPROXIMATE[name]
    rng = np.random.default_rng(0)
    x = rng.uniform(0.01, 3, 200).astype(np.float32)
    got = compute(f"{name}.approx.f32 {{d}}, {{a}};", np.float32, x).astype(float)
    want = np.array([function(float(v)) for v in x])
    assert (np.abs(got - want) <= np.abs(want) * relative + absolute).all()
    x = np.array([a for a, _ in SPECIAL[name]], np.float32)
    got = compute(f"{name}.approx.f32 {{d}}, {{a}};", np.float32, x)
    want = np.array([b for _, b in SPECIAL[name]], np.float32)
    np.testing.assert_array_equal(got, want)
    assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()


def test_approximations_with_ftz() -> None:
    x = np.array([1e-40, -1e-40, 2.0**127, -130.0, 1.0], np.float32)
    smallest = float(np.float32(1e-40))
    for name, want in {
        "ex2": [1, 1, INF, 0, 2],
        "lg2": [-INF, -INF, 127, NAN, 0],
        "rcp": [INF, -INF, 0, np.float32(-1 / 130), 1],
        "rsqrt": [INF, -INF, np.float32(2.0**-63.5), NAN, 1],
    }.items():
        got = compute(f"{name}.approx.ftz.f32 {{d}}, {{a}};", np.float32, x)
        np.testing.assert_array_equal(got, np.array(want, np.float32), name)
    got = compute("ex2.approx.f32 {d}, {a};", np.float32, x)
    assert got[3] == 2.0**-130
    got = compute("rcp.approx.f32 {d}, {a};", np.float32, x)
    assert got[2] == np.float32(2.0**-127) and got[0] == INF and smallest > 0


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["ex2", "tanh"])
def test_approximations_of_half_precisions(name: str, kind: str) -> None:
    form = FORMATS[kind]
    x = np.array([v for v in samples(kind, 1, 200)[0].tolist() if abs(form.decode(v)) < 8], np.uint16)
    full = f"{name}.approx.ftz.bf16" if (name, kind) == ("ex2", "bf16") else f"{name}.approx.{kind}"
    got = compute(f"{full} {{d}}, {{a}};", np.uint16, x)
    for a, b in zip(x.tolist(), got.tolist()):
        value = form.decode(a)
        value = flushed(value, form) if "ftz" in full else value
        want = APPROXIMATE[name][0](float(value))
        assert abs(float(form.decode(b)) - want) <= abs(want) * 2.0**-form.mantissa, (hex(a), hex(b))


def test_approximate_division() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 300)).astype(np.float32)
    want = a.astype(float) / b
    for name in ("div.approx.f32", "div.full.f32"):
        got = compute(written(name, 2), np.float32, a, b)
        assert (np.abs(got - want) <= np.abs(want) * 2.0**-22).all()
    a, b = np.array([1, -1, INF, 5], np.float32), np.array([2.0**127] * 3 + [INF], np.float32)
    got = compute(written("div.approx.f32", 2), np.float32, a, b)
    np.testing.assert_array_equal(got, np.array([0, 0, NAN, 0], np.float32))
    got = compute(written("div.full.f32", 2), np.float32, a, b)
    np.testing.assert_array_equal(got, np.array([2.0**-127, -(2.0**-127), INF, 0], np.float32))


def test_edges_are_what_they_are_called() -> None:
    """The oracle against numpy, which has three of its formats."""
    for kind, dtype in {"f16": np.float16, "f32": np.float32, "f64": np.float64}.items():
        for bits in edges(kind) + samples(kind, 1, 200)[0].tolist():
            value = FORMATS[kind].decode(bits)
            number = np.array([bits], UNSIGNED[FORMATS[kind].bits]).view(dtype)[0]
            assert is_nan(value) == np.isnan(number)
            if not is_nan(value):
                assert float(number) == value and FORMATS[kind].encode(value) == bits
