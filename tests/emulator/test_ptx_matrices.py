"""ldmatrix, stmatrix and mma.sync: layouts by the PTX manual's figures, element by element; naive sums of products."""

from collections.abc import Callable

import numpy as np
import pytest
from ptx_runner import run_ptx

LANES = range(32)


def registers(first: int, count: int) -> str:
    return "{ " + ", ".join(f"%r{first + n}" for n in range(count)) + " }"


# ---- ldmatrix and stmatrix: thread 4 g + t of a warp holds elements 2 t and 2 t + 1 of row g of each matrix of 8 x 8


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    """Lane 8 m + r names the row r of matrix m; rows lie anywhere, at multiples of 16 bytes."""
    rng = np.random.default_rng(count)
    rows = rng.integers(0, 2**16, (2, 32, 8)).astype(np.uint16)
    places = np.stack([rng.permutation(64)[:32] for _ in range(2)]).astype(np.uint32) * 16  # of each warp
    out = np.zeros((2, 32, count), np.uint32)
    code = f"""
    mad.wide.u32 %q10, %r0, 16, %q0;
    mad.wide.u32 %q11, %r0, 4, %q1;
    mad.wide.u32 %q12, %r0, {4 * count}, %q2;
    ld.global.v4.b32 {registers(10, 4)}, [%q10];
    ld.global.b32 %r2, [%q11];
    st.shared.v4.b32 [%r2], {registers(10, 4)};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {registers(20, count)}, [%r2];
    """
    code += "".join(f"st.global.b32 [%q12+{4 * n}], %r{20 + n};\n" for n in range(count))
    places[1] += 1024
    launch = run_ptx(code, rows.reshape(64, 8), places.reshape(64), out, threads=64, shared=2048)
    assert not launch.faults, launch.faults[0]
    for warp in range(2):
        for lane in LANES:
            for m in range(count):
                matrix = rows[warp, 8 * m : 8 * m + 8]
                matrix = matrix.T if transposed else matrix
                low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
                assert out[warp, lane, m] == int(low) | int(high) << 16


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, transposed: bool) -> None:
    rng = np.random.default_rng(count)
    held = rng.integers(0, 2**32, (32, count)).astype(np.uint32)
    out = np.zeros((8 * count, 8), np.uint16)
    code = f"""
    mad.wide.u32 %q10, %r0, {4 * count}, %q0;
    mul.lo.u32 %r2, %r0, 16;
    """
    code += "".join(f"ld.global.b32 %r{20 + n}, [%q10+{4 * n}];\n" for n in range(count))
    code += f"""
    stmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 [%r2], {registers(20, count)};
    bar.sync 0;
    setp.lt.u32 %p1, %r0, {8 * count};
    mad.wide.u32 %q11, %r0, 16, %q1;
    @%p1 ld.shared.v4.b32 {registers(10, 4)}, [%r2];
    @%p1 st.global.v4.b32 [%q11], {registers(10, 4)};
    """
    launch = run_ptx(code, held, out, shared=512)
    assert not launch.faults, launch.faults[0]
    for lane in LANES:
        for m in range(count):
            matrix = out[8 * m : 8 * m + 8]
            matrix = matrix.T if transposed else matrix
            for half in (0, 1):
                assert matrix[lane // 4, 2 * (lane % 4) + half] == int(held[lane, m]) >> 16 * half & 0xFFFF


# ---- mma.sync. Places of element i of a thread's fragments, g = lane / 4, t = lane % 4, after the manual's formulas.

Place = Callable[[int, int, int], tuple[int, int]]
FRAGMENTS: dict[str, tuple[int, Place, int, Place, int]] = {  # bits: (k, A, elements of A, B, elements of B)
    "m16n8k16 16": (
        16,
        lambda g, t, i: (g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)), 8,
        lambda g, t, i: (2 * t + i % 2 + 8 * (i // 2), g), 4,
    ),
    "m16n8k8 16": (
        8,
        lambda g, t, i: (g + 8 * (i // 2), 2 * t + i % 2), 4,
        lambda g, t, i: (2 * t + i, g), 2,
    ),
    "m16n8k4 32": (4, lambda g, t, i: (g + 8 * i, t), 2, lambda g, t, i: (t, g), 1),
    "m16n8k8 32": (
        8,
        lambda g, t, i: (g + 8 * (i % 2), t + 4 * (i // 2)), 4,
        lambda g, t, i: (t + 4 * i, g), 2,
    ),
    "m16n8k16 8": (
        16,
        lambda g, t, i: (g + 8 * (i // 4), 4 * t + i % 4), 8,
        lambda g, t, i: (4 * t + i, g), 4,
    ),
    "m16n8k32 8": (
        32,
        lambda g, t, i: (g + 8 * (i // 4 % 2), 4 * t + i % 4 + 16 * (i // 8)), 16,
        lambda g, t, i: (4 * t + i % 4 + 16 * (i // 4), g), 8,
    ),
}  # fmt: skip


def accumulator(g: int, t: int, i: int) -> tuple[int, int]:
    return g + 8 * (i // 2), 2 * t + i % 2


def bits_of(x: np.ndarray, kind: str) -> np.ndarray:
    """Small whole numbers as the bits of a type, for which every one of them is exact."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    if kind in ("bf16", "tf32", "f32"):
        wide = x.astype(np.float32).view(np.uint32)
        return (wide >> 16).astype(np.uint16) if kind == "bf16" else wide
    if kind in ("e4m3", "e5m2"):
        halves = x.astype(np.float16).view(np.uint16)  # e5m2 is its upper byte
        codes = {0: 0, 1: 0x38, 2: 0x40, 3: 0x44, 4: 0x48}
        e4m3 = np.vectorize(lambda v: codes[abs(int(v))] | (0x80 if v < 0 else 0))
        return (halves >> 8).astype(np.uint8) if kind == "e5m2" else e4m3(x).astype(np.uint8)
    return x.astype({"s8": np.int8, "u8": np.uint8, "s32": np.int32}[kind]).view({"s32": np.uint32}.get(kind, np.uint8))


def fragment(matrix: np.ndarray, place: Place, count: int) -> np.ndarray:
    """[32, registers]: each thread's elements of a matrix of bits."""
    return np.array([[matrix[place(n // 4, n % 4, i)] for i in range(count)] for n in LANES], matrix.dtype).view(
        np.uint32
    )


FORMS = [  # shape, kinds of d, a, b, c
    *[(f"m16n8k{k}", "f32", kind, kind, "f32") for k in (8, 16) for kind in ("f16", "bf16")],
    *[(f"m16n8k{k}", "f32", "tf32", "tf32", "f32") for k in (4, 8)],
    *[("m16n8k16", "f16", "f16", "f16", "f16"), ("m16n8k8", "f16", "f16", "f16", "f16")],
    *[(f"m16n8k{k}", "s32", a, b, "s32") for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")],
    *[("m16n8k32", "f32", a, b, "f32") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")],
]


def products(form: tuple[str, ...], chain: bool = False) -> None:
    """d = a b + c of two warps in two blocks; `chain`: twice, the second time from d and with other a and b."""
    shape, d_kind, a_kind, b_kind, c_kind = form
    size = {"tf32": 32, "f16": 16, "bf16": 16}.get(a_kind, 8)
    k, place_a, count_a, place_b, count_b = FRAGMENTS[f"{shape} {size}"]
    rng = np.random.default_rng(0)
    warps, turns = 4, 2 if chain else 1
    low = 0 if "u8" in (a_kind, b_kind) else -4
    a = rng.integers(low, 5, (turns, warps, 16, k))
    b = rng.integers(low, 5, (turns, warps, k, 8))
    if a_kind == "s8":
        a[rng.random(a.shape) < 0.2] = -128
    c = rng.integers(-50, 50, (warps, 16, 8))
    want = c + sum(np.einsum("wik,wkj->wij", a[n], b[n]) for n in range(turns))
    count_c = 4

    def laid(x: np.ndarray, kind: str, place: Place, count: int) -> np.ndarray:
        return np.stack([fragment(m, place, count) for m in bits_of(x, kind)]).reshape(warps * 32, -1)

    held_a = np.concatenate([laid(x, a_kind, place_a, count_a) for x in a], 1)
    held_b = np.concatenate([laid(x, b_kind, place_b, count_b) for x in b], 1)
    held_c = laid(c, c_kind, accumulator, count_c)
    want_d = laid(want, d_kind, accumulator, count_c)
    held = np.ascontiguousarray(np.concatenate([held_a, held_b, held_c], 1))
    out = np.zeros_like(want_d)
    code = f"""
    mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r1, %r1, 64, %r0;
    mad.wide.u32 %q10, %r1, {4 * held.shape[1]}, %q0;
    mad.wide.u32 %q11, %r1, {4 * out.shape[1]}, %q1;
    """
    code += "".join(f"ld.global.b32 %r{20 + n}, [%q10+{4 * n}];\n" for n in range(held.shape[1]))
    each_a, each_b = held_a.shape[1] // turns, held_b.shape[1] // turns
    first_c = 20 + held_a.shape[1] + held_b.shape[1]
    d, source = registers(200, out.shape[1]), registers(first_c, held_c.shape[1])
    for turn in range(turns):
        x, y = registers(20 + turn * each_a, each_a), registers(20 + held_a.shape[1] + turn * each_b, each_b)
        name = f"mma.sync.aligned.{shape}.row.col.{d_kind}.{a_kind}.{b_kind}.{c_kind}"
        code += f"{name} {d}, {x}, {y}, {source};\n".replace("{ %r" + str(20) + " }", "{ %r20 }")
        source = d
    code += "".join(f"st.global.b32 [%q11+{4 * n}], %r{200 + n};\n" for n in range(out.shape[1]))
    launch = run_ptx(code, held, out, threads=64, blocks=2)
    assert not launch.faults, launch.faults[0]
    assert (out == want_d).all()


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_products(form: tuple[str, ...]) -> None:
    products(form)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[5], FORMS[6], FORMS[10]], ids=" ".join)
def test_products_that_follow_each_other(form: tuple[str, ...]) -> None:
    products(form, chain=True)


def test_numbers_that_are_not_finite() -> None:
    """Infinity and NaN reach the elements of their row and column, and no others."""
    for value, others in ((np.inf, 1.0), (np.nan, 1.0), (np.inf, 0.0)):
        a = np.full((16, 16), others, np.float32)
        b = np.full((16, 8), others, np.float32)
        a[3, 5] = value
        _, place_a, count_a, place_b, count_b = FRAGMENTS["m16n8k16 16"]
        with np.errstate(invalid="ignore"):
            want = np.where(np.arange(16)[:, None] == 3, value * b[5:6] + 15 * others, 16 * others * others)
        held = np.concatenate(
            [fragment(bits_of(a, "f16"), place_a, count_a), fragment(bits_of(b, "f16"), place_b, count_b)], 1
        )
        held, out = np.ascontiguousarray(held), np.zeros((32, 4), np.float32)
        code = f"mad.wide.u32 %q10, %r0, {4 * held.shape[1]}, %q0; mad.wide.u32 %q11, %r0, 16, %q1;\n"
        code += "".join(f"ld.global.b32 %r{20 + n}, [%q10+{4 * n}];\n" for n in range(held.shape[1]))
        code += "".join(f"mov.b32 %r{40 + n}, 0;\n" for n in range(4))
        d, a_and_b = registers(40, 4), f"{registers(20, 4)}, {registers(24, 2)}"
        code += f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {d}, {a_and_b}, {d};\n"
        code += f"st.global.v4.b32 [%q11], {registers(40, 4)};"
        run_ptx(code, held, out)
        got = np.zeros((16, 8), np.float32)
        for n in LANES:
            for i in range(4):
                got[accumulator(n // 4, n % 4, i)] = out[n, i]
        np.testing.assert_array_equal(got, want)


def test_float16_accumulators_are_rounded() -> None:
    """2049 is no float16: 2048 + 1 is 2048, to the even one of its neighbours."""
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.full((16, 8), 2048)
    a[:, 0], b[0] = 1, 1
    _, place_a, count_a, place_b, count_b = FRAGMENTS["m16n8k16 16"]
    held = [
        fragment(bits_of(x, "f16"), *p)
        for x, p in ((a, (place_a, count_a)), (b, (place_b, count_b)), (c, (accumulator, 4)))
    ]
    held, out = np.ascontiguousarray(np.concatenate(held, 1)), np.zeros((32, 2), np.uint32)
    code = f"mad.wide.u32 %q10, %r0, {4 * held.shape[1]}, %q0; mad.wide.u32 %q11, %r0, 8, %q1;\n"
    code += "".join(f"ld.global.b32 %r{20 + n}, [%q10+{4 * n}];\n" for n in range(held.shape[1]))
    operands = ", ".join((registers(40, 2), registers(20, 4), registers(24, 2), registers(26, 2)))
    code += f"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {operands};\n"
    code += f"st.global.v2.b32 [%q11], {registers(40, 2)};"
    run_ptx(code, held, out)
    assert (out.view(np.float16) == 2048).all()


@pytest.mark.parametrize("saturates", [False, True])
def test_sums_of_integers_wrap_or_saturate(saturates: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, 32)), rng.integers(-128, 128, (32, 8))
    c = rng.choice([2**31 - 1, -(2**31), 2**31 - 100000, 0], (16, 8))
    _, place_a, count_a, place_b, count_b = FRAGMENTS["m16n8k32 8"]
    held = [fragment(bits_of(a, "s8"), place_a, count_a), fragment(bits_of(b, "s8"), place_b, count_b)]
    held.append(fragment(bits_of(c, "s32"), accumulator, 4))
    held, out = np.ascontiguousarray(np.concatenate(held, 1)), np.zeros((32, 4), np.uint32)
    code = f"mad.wide.u32 %q10, %r0, {4 * held.shape[1]}, %q0; mad.wide.u32 %q11, %r0, 16, %q1;\n"
    code += "".join(f"ld.global.b32 %r{20 + n}, [%q10+{4 * n}];\n" for n in range(held.shape[1]))
    operands = ", ".join((registers(40, 4), registers(20, 4), registers(24, 2), registers(26, 4)))
    name = f"mma.sync.aligned.m16n8k32.row.col.{'satfinite.' if saturates else ''}s32.s8.s8.s32"
    code += f"{name} {operands};\nst.global.v4.b32 [%q11], {registers(40, 4)};"
    run_ptx(code, held, out)
    total = a @ b + c
    want = np.clip(total, -(2**31), 2**31 - 1) if saturates else (total + 2**31) % 2**32 - 2**31
    assert (want != total).any()
    assert (out == fragment(bits_of(want, "s32"), accumulator, 4)).all()
