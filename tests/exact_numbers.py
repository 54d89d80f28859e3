"""Floating-point numbers by their definition (IEEE 754), one at a time and exactly: what tests of the emulator expect.

A number is a Fraction, or one of the floats nan, inf, -inf and -0.0.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product as pairs_of

import numpy as np

Number = Fraction | float
ZERO = Fraction(0)


@dataclass(frozen=True)
class Format:
    """A binary format: a sign, `exponent` and `mantissa` bits. finite: without infinities, the top being NaN."""

    exponent: int
    mantissa: int
    finite: bool = False

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def nan(self) -> int:
        """The canonical NaN of PTX: all ones but the sign."""
        return 2 ** (self.bits - 1) - 1

    @property
    def infinity(self) -> int:
        return (2**self.exponent - 1) << self.mantissa

    @property
    def largest(self) -> int:
        return self.nan - 1 if self.finite else self.infinity - 1

    @cache  # noqa: B019 (formats are few)
    def decode(self, bits: int) -> Number:
        negative, rest = bits >> (self.bits - 1), bits & self.nan
        e, m = rest >> self.mantissa, rest & (2**self.mantissa - 1)
        if rest == self.nan or (rest > self.infinity and not self.finite):
            return math.nan
        if rest == self.infinity and not self.finite:
            return -math.inf if negative else math.inf
        if rest == 0:
            return -0.0 if negative else ZERO
        size = Fraction(m + (2**self.mantissa if e else 0)) * Fraction(2) ** (max(e, 1) - self.bias - self.mantissa)
        return -size if negative else size

    def encode(self, x: Number, mode: str = "rn") -> int:
        """The bits of a number, rounded: rn to the nearest even, rna halves away from zero, rz, rm, rp."""
        if isinstance(x, float):
            if math.isnan(x):
                return self.nan
            sign = (math.copysign(1, x) < 0) << (self.bits - 1)
            return sign | ((self.largest if self.finite else self.infinity) if math.isinf(x) else 0)
        if x == 0:
            return 0
        sign, n, d = (x < 0) << (self.bits - 1), abs(x.numerator), x.denominator
        e = n.bit_length() - d.bit_length()
        e -= (n < d << e) if e >= 0 else (n << -e < d)
        e = max(e, 1 - self.bias)  # of the unit of the mantissa's first bit
        shift = self.mantissa - e
        d = d << -shift if shift < 0 else d
        steps, rest = divmod(n << max(shift, 0), d)  # 2**mantissa <= steps < 2 ** (mantissa + 1), or less if subnormal
        up = {"rz": False, "rm": x < 0, "rp": x > 0}.get(mode)
        if up is None:
            up = 2 * rest > d or (2 * rest == d and (mode == "rna" or steps % 2 == 1))
        bits = ((e - 1 + self.bias) << self.mantissa) + steps + (rest > 0 and up)  # a carry makes the exponent larger
        if bits > self.largest:
            away = mode in ("rn", "rna") or up
            bits = self.infinity if away and not self.finite else self.largest
        return sign | bits


FORMATS = {
    "f16": Format(5, 10),
    "bf16": Format(8, 7),
    "tf32": Format(8, 10),
    "f32": Format(8, 23),
    "f64": Format(11, 52),
    "e4m3": Format(4, 3, finite=True),
    "e5m2": Format(5, 2),
}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def sign_of(x: Number) -> float:
    return math.copysign(1, x) if isinstance(x, float) else (-1 if x < 0 else 1)


def zero(sign: float) -> Number:
    return -0.0 if sign < 0 else ZERO


def is_nan(x: Number) -> bool:
    return isinstance(x, float) and math.isnan(x)


def is_infinite(x: Number) -> bool:
    return isinstance(x, float) and math.isinf(x)


def times(x: Number, y: Number) -> Number:
    sign = sign_of(x) * sign_of(y)
    if is_nan(x) or is_nan(y) or (is_infinite(x) and y == 0) or (is_infinite(y) and x == 0):
        return math.nan
    if is_infinite(x) or is_infinite(y):
        return sign * math.inf
    return Fraction(x) * Fraction(y) if x != 0 and y != 0 else zero(sign)


def plus(x: Number, y: Number, mode: str = "rn") -> Number:
    if is_nan(x) or is_nan(y):
        return math.nan
    if is_infinite(x) or is_infinite(y):
        return float(x if is_infinite(x) else y) if x != -y else math.nan
    if x != -y:
        return Fraction(x) + Fraction(y)
    same = x == 0 and sign_of(x) == sign_of(y)
    return zero(sign_of(x)) if same else zero(-1 if mode == "rm" else 1)


def minus(x: Number, y: Number, mode: str = "rn") -> Number:
    return plus(x, times(Fraction(-1), y), mode)


def fused(x: Number, y: Number, z: Number, mode: str = "rn") -> Number:
    return plus(times(x, y), z, mode)


def over(x: Number, y: Number) -> Number:
    sign = sign_of(x) * sign_of(y)
    if is_nan(x) or is_nan(y) or (is_infinite(x) and is_infinite(y)) or (x == 0 and y == 0):
        return math.nan
    if is_infinite(x) or y == 0:
        return sign * math.inf
    return zero(sign) if is_infinite(y) or x == 0 else Fraction(x) / Fraction(y)


def root(x: Number) -> Number:
    """The square root to 300 bits, with one more that says whether there are others."""
    if x == 0 or is_nan(x) or (is_infinite(x) and x > 0):
        return x
    if sign_of(x) < 0:
        return math.nan
    x = Fraction(x)
    scaled = x.numerator * x.denominator << 2600
    whole = math.isqrt(scaled)
    return (Fraction(2 * whole) + (whole * whole != scaled)) / (x.denominator << 1301)


def flushed(x: Number, form: Format) -> Number:
    """Subnormals as zeros of their sign: .ftz."""
    tiny = x != 0 and abs(x) < Fraction(2) ** (1 - form.bias)
    return zero(sign_of(x)) if tiny else x


def between_0_and_1(x: Number) -> Number:
    """.sat"""
    return ZERO if is_nan(x) or x <= 0 else min(Fraction(1), x) if not is_infinite(x) else Fraction(1)


def edges(kind: str, few: bool = False) -> list[int]:
    """The bits of numbers where things happen: zeros, subnormals, 1 and its neighbours, the largest, infinity, NaN."""
    form = FORMATS[kind]
    one, least = form.bias << form.mantissa, 1 << form.mantissa
    most = [0, 1, one, one + 1, form.largest, form.nan, least]
    if not few:
        most += [least - 1, one - 1, one + 3, one + least // 2, one + least, least + 1, form.largest // 2, one // 2]
        most += [] if form.finite else [form.infinity + 1]
    if not form.finite:
        most.append(form.infinity)
    return most + [bits | 1 << (form.bits - 1) for bits in most]


def samples(kind: str, arguments: int, count: int = 300, seed: int = 0) -> list[np.ndarray]:
    """Bits of arguments: `count` rows of edges beside edges, and as many of random ones, of which half are near 1."""
    form = FORMATS[kind]
    rng = np.random.default_rng(seed)
    chosen = list(pairs_of(*[edges(kind, few=arguments > 2)] * arguments))
    if len(chosen) > count:
        chosen = [chosen[n] for n in rng.permutation(len(chosen))[:count]]
    dtype = UNSIGNED[form.bits if kind != "tf32" else 32]
    any_bits = rng.integers(0, 2**form.bits, (count // 2, arguments), dtype=np.uint64 if form.bits == 64 else np.int64)
    one = form.bias << form.mantissa
    near = one + rng.integers(-(3 << form.mantissa), 3 << form.mantissa, (count // 2, arguments))
    near |= rng.integers(0, 2, near.shape) * ((1 << (form.bits - 1)) if form.bits < 64 else 0)
    near &= ~(rng.integers(0, 2, near.shape) * ((1 << form.mantissa // 2) - 1))  # half of them short, for ties
    rows = np.concatenate([np.array(chosen, dtype), any_bits.astype(dtype), near.astype(dtype)])
    return [np.ascontiguousarray(column) for column in rows.T]


def expected(
    kind: str, function: Callable[..., Number], arguments: Iterable[np.ndarray], mode: str = "rn"
) -> list[int]:
    """The bits of a function's rounded results."""
    form = FORMATS[kind]
    return [form.encode(function(*map(form.decode, row)), mode) for row in zip(*(x.tolist() for x in arguments))]


def assert_same_numbers(
    kind: str, got: np.ndarray, want: list[int], arguments: list[np.ndarray], any_nan: bool = False
) -> None:
    """Equal bits; with `any_nan` any NaN for a NaN, as PTX leaves them open in some results of f32 and f64."""
    form = FORMATS[kind]
    bits = got.view(UNSIGNED[form.bits])
    wrong = bits != np.array(want, bits.dtype)
    if any_nan:
        magnitude = bits & bits.dtype.type(form.nan)
        wrong &= ~((np.array(want, bits.dtype) == form.nan) & (magnitude > form.infinity))
    rows = [
        f"{[hex(int(x[n])) for x in arguments]} -> {int(bits[n]):#x}, not {want[n]:#x}"
        for n in np.flatnonzero(wrong)[:8]
    ]
    assert not rows, f"{int(wrong.sum())} of {len(want)} are wrong: " + "; ".join(rows)
