"""Registers that are alike in all threads of a block, or in all blocks, are small: results are as of whole ones."""

import re

import numpy as np
import pytest
from ptx_runner import LETTER, run_ptx

THREADS, BLOCKS = 64, 3
FORMS = """
add.f32 d4, a4, b4; | mul.rn.f32 d4, a4, b4; | fma.rn.f32 d4, a4, b4, c4; | add.ftz.f32 d4, a4, b4;
add.rz.f32 d4, a4, b4; | fma.rn.f16x2 d4, a4, b4, c4; | fma.rn.bf16x2 d4, a4, b4, c4; | mul.rn.bf16 d2, a2, b2;
add.rn.f16 d2, a2, b2; | neg.bf16x2 d4, a4; | fma.rn.f64 d8, a8, b8, c8; | add.rm.f64 d8, a8, b8;
max.f32 d4, a4, b4; | min.NaN.bf16x2 d4, a4, b4; | max.f16 d2, a2, b2; | max.xorsign.abs.f32 d4, a4, b4;
fma.rn.relu.f16 d2, a2, b2, c2; | add.sat.f32 d4, a4, b4; | div.full.f32 d4, a4, b4; | div.rn.f32 d4, a4, b4;
div.approx.f32 d4, a4, b4; | sqrt.rz.f32 d4, a4; | ex2.approx.f32 d4, a4; | rsqrt.approx.ftz.f32 d4, a4;
add.s32 d4, a4, b4; | mul.hi.u32 d4, a4, b4; | mul.hi.s64 d8, a8, b8; | mad.lo.s32 d4, a4, b4, c4;
mul.wide.s32 d8, a4, b4; | shr.s32 %r50, b4, 20; div.s32 d4, a4, %r50; | rem.u32 d4, a4, b4;
mad24.hi.u32 d4, a4, b4, c4; | sad.s32 d4, a4, b4, c4; | dp4a.s32.u32 d4, a4, b4, c4;
and.b32 %r50, b4, 63; shl.b32 d4, a4, %r50; | and.b32 %r50, b4, 127; shr.s64 d8, a8, %r50;
shf.l.wrap.b32 d4, a4, b4, c4; | and.b32 %r50, b4, 31; and.b32 %r51, c4, 15; bfe.s32 d4, a4, %r50, %r51;
and.b32 %r50, c4, 31; bfi.b32 d4, a4, b4, %r50, 9; | prmt.b32 d4, a4, b4, c4; | prmt.b32 d4, a4, b4, 0x5410;
prmt.b32 d4, a4, b4, 0xb1c4; | lop3.b32 d4, a4, b4, c4, 0x1b; | popc.b32 d4, a4; | clz.b64 d4, a8;
brev.b32 d4, a4; | bfind.s32 d4, a4; | and.b32 %r50, a4, 31; and.b32 %r51, b4, 15; bmsk.clamp.b32 d4, %r50, %r51;
min.s32 d4, a4, b4; | cvt.rn.bf16x2.f32 d4, a4, b4; | cvt.rn.f16.f32 d2, a4; | cvt.f32.bf16 d4, a2;
cvt.rzi.s32.f32 d4, a4; | cvt.rn.f32.u64 d4, a8; | cvt.rn.satfinite.e4m3x2.f32 d2, a4, b4;
cvt.rn.f16x2.e5m2x2 d4, a2; | cvt.rna.tf32.f32 d4, a4; | cvt.sat.s8.s32 d4, a4; | cvt.rz.bf16.f32 d2, a4;
cvt.rni.f32.f32 d4, a4; | cvt.s64.s32 d8, a4; | mov.b64 d8, { a4, b4 }; | mov.b32 d4, { a2, b2 };
setp.lt.s32 %p1, a4, b4; selp.b32 d4, a4, c4, %p1; | setp.geu.f32 %p1, a4, b4; selp.b32 d4, 1, c4, !%p1;
setp.ne.b32 %p1, a4, b4; @%p1 add.s32 d4, a4, c4; | setp.lt.u32 %p1, a4, b4; @!%p1 mov.b32 d4, c4;
shfl.sync.bfly.b32 d4, a4, 3, 31, -1; | shfl.sync.idx.b32 d4, a4, b4, 0x181f, -1; | redux.sync.add.u32 d4, a4, -1;
setp.lt.u32 %p1, a4, b4; vote.sync.ballot.b32 d4, %p1, -1; | match.any.sync.b32 d4, a4, -1;
set.lt.u32.s32 d4, a4, b4;
mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {d4, %r51, %r52, %r53}, {a4, b4}, {a4}, {c4, c4, c4, c4};
st.shared.b32 [%r9], a4; bar.sync 0; ld.shared.b32 d4, [%r9]; | slct.b32.s32 d4, a4, b4, c4;
copysign.f32 d4, a4, b4;
"""
SHAPES = {"thread": "%tid.x", "block": "%ctaid.x", "one": None}
COMBINATIONS = [("one", "one", "one"), ("block", "thread", "one"), ("thread", "one", "block")]
FACTOR = 0x9E3779B1


def values(shape: str, size: int, salt: int) -> np.ndarray:
    """[blocks, threads] of what `source` writes."""
    thread, block = np.arange(THREADS, dtype=np.uint64)[None], np.arange(BLOCKS, dtype=np.uint64)[:, None]
    number = {"thread": thread, "block": block, "one": np.zeros((1, 1), np.uint64)}[shape]
    low = (number * np.uint64(FACTOR) + np.uint64(salt)) & np.uint64(0xFFFFFFFF)
    whole = low | low << np.uint64(32) if size == 8 else low
    return np.broadcast_to(whole, (BLOCKS, THREADS)).astype({2: np.uint16, 4: np.uint32, 8: np.uint64}[size])


def source(shape: str, register: str, size: int, salt: int) -> str:
    """Instructions that give a register a number that depends on the thread, on the block, or on nothing."""
    code = f"mov.u32 %r60, {SHAPES[shape] or 0}; mad.lo.u32 %r60, %r60, {FACTOR}, {salt};"
    rest = {
        4: f"mov.b32 {register}, %r60;",
        2: f"cvt.u16.u32 {register}, %r60;",
        8: f"mov.b64 {register}, {{ %r60, %r60 }};",
    }
    return code + rest[size]


@pytest.mark.parametrize("form", [form.strip() for form in FORMS.replace("\n", "|").split("|") if form.strip()])
def test_small_registers_give_the_same(form: str) -> None:
    sizes = dict.fromkeys("abcd", 0) | {letter: int(size) for letter, size in re.findall(r"\b([a-d])([248])\b", form)}
    operands = [letter for letter in "abc" if sizes[letter]]
    size = sizes["d"]
    code = re.sub(r"\b([a-d])([248])\b", lambda m: f"%{LETTER[int(m[2])]}{11 + 'abcd'.index(m[1])}", form)
    result = f"%{LETTER[size]}14"
    start = f"mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, {THREADS}, %r0; mad.wide.u32 %q20, %r1, {size}, %q0;\n"
    start += f"mul.lo.u32 %r9, %r0, 4; mov.b{8 * size} {result}, 0;\n"
    end = f"\nst.global.b{8 * size} [%q20], {result};"

    total = 0
    for shapes in {shapes[: len(operands)] for shapes in COMBINATIONS}:
        inputs, loads, written = [], "", ""
        for n, (letter, shape) in enumerate(zip(operands, shapes)):
            width, salt = sizes[letter], (0x3F9D70A4, 0x40490FDB, 0x12345685)[n]
            register = f"%{LETTER[width]}{11 + n}"
            inputs.append(np.ascontiguousarray(values(shape, width, salt)))
            loads += f"mad.wide.u32 %q21, %r1, {width}, %q{n + 1}; ld.global.b{8 * width} {register}, [%q21];\n"
            written += source(shape, register, width, salt)
        whole, small = np.zeros((2, BLOCKS, THREADS), {2: np.uint16, 4: np.uint32, 8: np.uint64}[size])
        for body, out in ((loads, whole), (written, small)):
            launch = run_ptx(
                start + body + code + end, out, *inputs, threads=THREADS, blocks=BLOCKS, shared=4 * THREADS
            )
            assert not launch.faults, launch.faults[0]
        nan = np.zeros(whole.shape, bool)
        if ".f32" in form or ".f64" in form:  # whose NaN are any
            kind = {4: np.float32, 8: np.float64}.get(size)
            nan = np.isnan(whole.view(kind)) & np.isnan(small.view(kind)) if kind else nan
        assert ((whole == small) | nan).all(), shapes
        total += int(np.count_nonzero(whole))
    assert total, "results that are all 0 say nothing"
