"""Sums of several registers, by carries, and variables with values."""

import numpy as np
from ptx_runner import compute, run_ptx

EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2**32, 2**64 - 1]


def pairs() -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(np.array(EDGES, np.uint64), np.array(EDGES, np.uint64))
    return a.ravel(), b.ravel()


SPLIT = "mov.b64 {{%r100, %r101}}, {a}; mov.b64 {{%r102, %r103}}, {b};"
JOIN = "mov.b64 {d}, {{%r104, %r105}};"


def test_sums_and_differences_of_two_registers() -> None:
    a, b = pairs()
    code = f"{SPLIT} add.cc.u32 %r104, %r100, %r102; addc.u32 %r105, %r101, %r103; {JOIN}"
    assert (compute(code, np.uint64, a, b) == a + b).all()
    code = f"{SPLIT} sub.cc.u32 %r104, %r100, %r102; subc.u32 %r105, %r101, %r103; {JOIN}"
    assert (compute(code, np.uint64, a, b) == a - b).all()


def test_the_carry_goes_on_through_three() -> None:
    a, b = pairs()
    code = """add.cc.u64 %q15, {a}, {b}; addc.cc.u64 %q16, {a}, {b}; addc.u32 %r104, 0, 0; cvt.u64.u32 {d}, %r104;"""
    want = [((x + y >> 64) + x + y) >> 64 for x, y in zip(a.tolist(), b.tolist())]
    assert compute(code, np.uint64, a, b).tolist() == want


def test_a_product_of_64_bits_by_halves() -> None:
    a, b = pairs()
    code = f"""{SPLIT}
    mul.lo.u32 %r104, %r100, %r102;
    mul.hi.u32 %r106, %r100, %r102;
    mad.lo.cc.u32 %r107, %r101, %r102, %r106;
    madc.hi.u32 %r108, %r101, %r102, 0;
    mad.lo.u32 %r105, %r100, %r103, %r107;
    {JOIN}"""
    assert (compute(code, np.uint64, a, b) == a * b).all()


def test_variables_hold_their_values() -> None:
    out = np.zeros(32, np.uint32)
    declarations = """
.global .align 4 .u32 table[4] = {7, 0x10, 4294967295};
.const .align 1 .b8 bytes[3] = {1, 2, 255};
.global .align 4 .f32 half = 0f3F000000;
"""
    body = """
    and.b32 %r1, %r0, 3;
    mov.u64 %q5, table;
    mad.wide.u32 %q5, %r1, 4, %q5;
    ld.global.u32 %r2, [%q5];
    ld.const.s8 %r3, [bytes+2];
    ld.global.b32 %r4, [half];
    add.u32 %r2, %r2, %r3;
    add.u32 %r2, %r2, %r4;
    mad.wide.u32 %q6, %r0, 4, %q0;
    st.global.u32 [%q6], %r2;
    """
    launch = run_ptx(body, out, declarations=declarations)
    assert not launch.faults
    table = np.array([7, 0x10, 4294967295, 0], np.uint32)
    assert (out == np.tile(table, 8) - np.uint32(1) + np.uint32(0x3F000000)).all()
