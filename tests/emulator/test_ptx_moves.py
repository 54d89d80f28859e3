"""Moves, choices, comparisons, special registers and guards of PTX."""

import math
import operator

import numpy as np
import pytest
from exact_numbers import FORMATS, is_nan, samples
from ptx_runner import compute, run_ptx
from test_ptx_integers import arguments, signed

ORDERED = {
    **{
        "eq": operator.eq,
        "ne": operator.ne,
        "lt": operator.lt,
        "le": operator.le,
        "gt": operator.gt,
        "ge": operator.ge,
    },
}
UNSIGNED_NAMES = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_comparisons_of_integers(kind: str) -> None:
    bits, (a, b) = int(kind[1:]), arguments(int(kind[1:]), 2)
    names = ORDERED | (UNSIGNED_NAMES if kind[0] == "u" else {})
    for name, function in names.items():
        got = compute(f"setp.{name}.{kind} %p0, {{a}}, {{b}};", np.uint32, a, b)
        rows = zip(a.tolist(), b.tolist())
        values = [(signed(x, bits), signed(y, bits)) if kind[0] == "s" else (x, y) for x, y in rows]
        assert got.tolist() == [int(function(*row)) for row in values], name
    for name in ("eq", "ne"):
        got = compute(f"setp.{name}.b{bits} %p0, {{a}}, {{b}};", np.uint32, a, b)
        assert got.tolist() == [int(ORDERED[name](*row)) for row in zip(a.tolist(), b.tolist())]


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_comparisons_of_floats(kind: str) -> None:
    """Ordered ones are false for NaN, unordered ones (equ …) true; -0 equals +0."""
    a, b = samples(kind, 2, 100)
    rows = [(FORMATS[kind].decode(x), FORMATS[kind].decode(y)) for x, y in zip(a.tolist(), b.tolist())]
    nan = [is_nan(x) or is_nan(y) for x, y in rows]
    for name, function in ORDERED.items():
        holds = [function(x, y) for x, y in rows]
        got = compute(f"setp.{name}.{kind} %p0, {{a}}, {{b}};", np.uint32, a, b)
        assert got.tolist() == [int(h and not n) for h, n in zip(holds, nan)], name
        got = compute(f"setp.{name}u.{kind} %p0, {{a}}, {{b}};", np.uint32, a, b)
        assert got.tolist() == [int(h or n) for h, n in zip(holds, nan)], f"{name}u"
    assert compute(f"setp.nan.{kind} %p0, {{a}}, {{b}};", np.uint32, a, b).tolist() == [int(n) for n in nan]
    assert compute(f"setp.num.{kind} %p0, {{a}}, {{b}};", np.uint32, a, b).tolist() == [int(not n) for n in nan]


def test_comparisons_with_a_predicate_and_two_results() -> None:
    a, b = arguments(32, 2)
    bit, holds = a & 1, (a.view(np.int32) < b.view(np.int32)).astype(np.uint32)
    start = "and.b32 %r100, {a}, 1; setp.ne.u32 %p1, %r100, 0; "
    for name, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        got = compute(f"{start}setp.lt.{name}.s32 %p0, {{a}}, {{b}}, %p1;", np.uint32, a, b)
        assert (got == function(holds, bit)).all()
        got = compute(f"{start}setp.lt.{name}.s32 %p0, {{a}}, {{b}}, !%p1;", np.uint32, a, b)
        assert (got == function(holds, 1 - bit)).all()
        got = compute(f"{start}setp.lt.{name}.s32 %p2|%p0, {{a}}, {{b}}, %p1;", np.uint32, a, b)
        assert (got == function(1 - holds, bit)).all()  # the second: the comparison inverted, then combined
        got = compute(f"{start}setp.lt.{name}.s32 %p0|%p2, {{a}}, {{b}}, %p1;", np.uint32, a, b)
        assert (got == function(holds, bit)).all()


def test_set_selp_slct() -> None:
    a, b = arguments(32, 2)
    holds = a < b
    assert (compute("set.lt.u32.u32 {d}, {a}, {b};", np.uint32, a, b) == np.where(holds, 0xFFFFFFFF, 0)).all()
    assert (compute("set.lt.f32.u32 {d}, {a}, {b};", np.float32, a, b) == holds).all()
    for bits in (16, 32, 64):
        x, y = arguments(bits, 2)
        choice = np.arange(len(x), dtype=np.uint32) % 3
        got = compute(f"setp.eq.u32 %p1, {{c}}, 1; selp.b{bits} {{d}}, {{a}}, {{b}}, %p1;", x.dtype, x, y, choice)
        assert (got == np.where(choice == 1, x, y)).all()
        got = compute(f"setp.eq.u32 %p1, {{c}}, 1; selp.b{bits} {{d}}, {{a}}, 7, !%p1;", x.dtype, x, y, choice)
        assert (got == np.where(choice != 1, x, x.dtype.type(7))).all()
    c = (b ^ a).view(np.int32)
    got = compute("slct.b32.s32 {d}, {a}, {b}, {c};", np.uint32, a, b, c.view(np.uint32))
    assert (got == np.where(c >= 0, a, b)).all()
    c = np.resize(np.array([0.0, -0.0, 1, -1, math.nan, math.inf, -math.inf], np.float32), len(a))
    got = compute("slct.b32.f32 {d}, {a}, {b}, {c};", np.uint32, a, b, c)
    assert (got == np.where(c >= 0, a, b)).all()


def test_packing_and_unpacking() -> None:
    a, b = arguments(32, 2)
    (wide,) = arguments(64, 1)
    short, other = arguments(16, 2)
    assert (compute("mov.b64 {d}, {{ {a}, {b} }};", np.uint64, a, b) == a | b.astype(np.uint64) << np.uint64(32)).all()
    got = compute("mov.b32 {d}, {{ {a}, {b} }};", np.uint32, short, other)
    assert (got == short | other.astype(np.uint32) << np.uint32(16)).all()
    got = compute("mov.b64 {d}, {{ {a}, {b}, {a}, {b} }};", np.uint64, short, other)
    want = sum(x.astype(np.uint64) << np.uint64(16 * n) for n, x in enumerate((short, other, short, other)))
    assert (got == want).all()
    assert (compute("mov.b64 {{ %r100, {d} }}, {a};", np.uint32, wide) == wide >> np.uint64(32)).all()
    assert (compute("mov.b64 {{ {d}, _ }}, {a};", np.uint32, wide) == wide & np.uint64(0xFFFFFFFF)).all()
    got = compute("mov.b64 {{ %h1, %h2, {d}, %h3 }}, {a};", np.uint16, wide)
    assert (got == (wide >> np.uint64(32) & np.uint64(0xFFFF))).all()
    assert (compute("mov.b32 {{ %h1, {d} }}, {a};", np.uint16, a) == a >> np.uint32(16)).all()
    swap = "mov.b32 {{ %h1, %h2 }}, {a}; mov.b32 {d}, {{ %h2, %h1 }};"
    assert (compute(swap, np.uint32, a) == (a >> np.uint32(16) | a << np.uint32(16))).all()


def test_immediate_numbers() -> None:
    a = np.zeros(64, np.uint32)
    for text, want in {"0f3FC00000": 1.5, "0fFF800000": -math.inf, "0f00000001": 2.0**-149}.items():
        assert (compute(f"mov.f32 {{d}}, {text};", np.float32, a) == np.float32(want)).all()
        assert (compute(f"add.f32 {{d}}, {{a}}, {text};", np.float32, a) == np.float32(want)).all()
    assert (compute("mov.f64 {d}, 0d3FF8000000000000;", np.float64, a) == 1.5).all()
    assert (compute("add.s32 {d}, {a}, -5;", np.int32, a) == -5).all()
    assert (compute("mov.u32 {d}, 0xDEADBEEF;", np.uint32, a) == 0xDEADBEEF).all()
    assert (compute("add.s64 {d}, {b}, -5;", np.int64, a, a.astype(np.uint64)) == -5).all()


def test_special_registers() -> None:
    names = ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x", "%laneid", "%tid.y", "%ntid.z", "%lanemask_lt")
    names += ("%lanemask_le", "%lanemask_eq", "%lanemask_ge", "%lanemask_gt", "%ctaid.y", "%nctaid.z")
    out = np.zeros((3, 64, len(names)), np.uint32)
    code = f"mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 64, %r0; mad.wide.u32 %q20, %r1, {4 * len(names)}, %q0;\n"
    for n, name in enumerate(names):
        code += f"mov.u32 %r2, {name}; st.global.u32 [%q20+{4 * n}], %r2;\n"
    run_ptx(code, out, threads=64, blocks=3)
    thread, block = np.arange(64), np.arange(3)[:, None]
    lane = thread % 32
    below, this = (1 << lane) - 1, 1 << lane
    every = 0xFFFFFFFF
    want = [thread, 64, block, 3, lane, 0, 1, below, below | this, this, every & ~below, every & ~(below | this), 0, 1]
    for n, values in enumerate(want):
        assert (out[..., n] == values).all(), names[n]


def test_guards_leave_other_threads_as_they_were() -> None:
    (a,) = arguments(32, 1)
    even = (a & 1) == 0
    start = "and.b32 %r100, {a}, 1; setp.ne.u32 %p1, %r100, 0; mov.u32 {d}, 7; "
    assert (compute(start + "@%p1 add.u32 {d}, {a}, 3;", np.uint32, a) == np.where(even, 7, a + np.uint32(3))).all()
    assert (compute(start + "@!%p1 add.u32 {d}, {a}, 3;", np.uint32, a) == np.where(even, a + np.uint32(3), 7)).all()
    got = compute(start + "@%p1 mov.b32 {{ %h1, %h2 }}, {a}; @%p1 cvt.u32.u16 {d}, %h2;", np.uint32, a)
    assert (got == np.where(even, 7, a >> np.uint32(16))).all()
    got = compute(
        start + "setp.lt.u32 %p0, {a}, 100; @%p1 setp.ge.u32 %p0, {a}, 100; selp.u32 {d}, 1, 0, %p0;", np.uint32, a
    )
    assert (got == np.where(even, a < 100, a >= 100)).all()
    got = compute(start + "@%p1 selp.b32 {d}, {a}, 5, %p1;", np.uint32, a)
    assert (got == np.where(even, 7, a)).all()


def test_registers_of_a_scope_are_its_own() -> None:
    (a,) = arguments(32, 1)
    code = "mov.u32 %r100, 5;\n{{ .reg .b32 t; .reg .b32 x<2>; add.u32 t, {a}, 1; mov.b32 x1, t; mov.b32 {d}, x1; }}\n"
    code += "{{ .reg .b32 t; mov.u32 t, %r100; add.u32 {d}, {d}, t; }}"
    assert (compute(code, np.uint32, a) == a + np.uint32(6)).all()


def test_generic_addresses_of_global_memory() -> None:
    out = np.zeros(32, np.uint32)
    code = "cvta.to.global.u64 %q10, %q0; mad.wide.u32 %q10, %r0, 4, %q10; cvta.global.u64 %q11, %q10;"
    run_ptx(code + "cvta.to.global.u64 %q11, %q11; st.global.u32 [%q11], %r0;", out)
    assert (out == np.arange(32)).all()
