"""Registers that are used before they are written, or before wgmma has computed them, are faults; no others are."""

import numpy as np
import pytest
from ptx_runner import run_ptx

STORE = "mad.wide.u32 %q10, %r0, 4, %q0; st.global.b32 [%q10], %r9;"


def kinds(code: str, **options) -> list[str]:
    """The kinds of faults of a kernel that may write 128 words, with what it wrote."""
    out = np.zeros(128, np.uint32)
    return [fault.kind for fault in run_ptx(code, out, threads=options.pop("threads", 32), **options).faults]


WRITTEN = {
    "by every path": "setp.lt.u32 %p1, %r0, 9; @%p1 bra A; mov.b32 %r9, 1; bra B; A: mov.b32 %r9, 2; B:",
    "under both guards": "setp.lt.u32 %p1, %r0, 9; @%p1 mov.b32 %r9, 1; @!%p1 mov.b32 %r9, 2;",
    "under a guard": "mov.b32 %r9, 3; setp.lt.u32 %p1, %r0, 9; @%p1 mov.b32 %r8, 1; @%p1 mov.b32 %r9, %r8;",
    "in the part that is chosen": "setp.lt.u32 %p1, %r0, 9; @%p1 mov.b32 %r8, 1; selp.b32 %r9, %r8, 7, %p1;",
    "in the lane that is read": """setp.lt.u32 %p1, %r0, 1; @%p1 mov.b32 %r8, 1;
        shfl.sync.idx.b32 %r9, %r8, 0, 31, -1;""",
    "in the bytes that are picked": "mov.b32 %r7, 1; prmt.b32 %r6, %r7, %r8, 0x7610; prmt.b32 %r9, %r6, 0, 0x5410;",
    "in the half that is unpacked": """mov.b32 %r7, 1; prmt.b32 %r6, %r7, %r8, 0x7610; mov.b32 {%h1, %h2}, %r6;
        cvt.u32.u16 %r9, %h1;""",
    "in the half that is masked": """mov.b16 %h1, 5; mov.b32 %r6, {%h1, %h2}; mov.b32 {%h3, %h4}, %r6;
        mov.b32 %r9, {%h3, %h3};""",
    "in the byte that is stored": """mov.b32 %r6, 0f3F800000; cvt.rn.satfinite.e4m3x2.f32 %h1, %r7, %r6;
        mad.wide.u32 %q10, %r0, 4, %q0; st.global.b8 [%q10], %h1; mov.b32 %r9, 0;""",
    "in both halves": """mov.b32 %r6, 0f3F800000; cvt.rn.satfinite.e4m3x2.f32 %h1, %r6, %r6;
        cvt.u32.u16 %r9, %h1;""",
    "in the half that is rounded": """mov.b16 %h1, 5; mov.b32 %r6, {%h1, %h2}; cvt.rn.satfinite.e4m3x2.f16x2 %h3, %r6;
        cvt.u32.u16 %r5, %h3; and.b32 %r9, %r5, 255;""",
    "in the bytes below": """mov.b16 %h1, 5; mov.b32 %r6, {%h1, %h2}; add.u32 %r7, %r6, 9; cvt.u16.u32 %h3, %r7;
        cvt.u32.u16 %r9, %h3;""",
    "in the half that is shifted": "mov.b16 %h1, 5; mov.b32 %r6, {%h1, %h2}; shl.b32 %r9, %r6, 16;",
    "before a loop": "mov.b32 %r9, 0; L: add.u32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, %r0; @%p1 bra L;",
}


@pytest.mark.parametrize("code", WRITTEN.values(), ids=WRITTEN)
def test_what_every_thread_has_written_is_no_fault(code: str) -> None:
    assert kinds(code + STORE) == []


UNWRITTEN = {
    "never": "",
    "by one path": "setp.lt.u32 %p1, %r0, 9; @%p1 bra B; mov.b32 %r9, 1; B:",
    "under a guard": "setp.lt.u32 %p1, %r0, 9; @%p1 mov.b32 %r9, 1;",
    "from what is not": "add.u32 %r9, %r8, 1;",
    "by a copy of what is not": "mov.b32 %r9, %r8;",
    "from a lane that has not": """setp.gt.u32 %p1, %r0, 0; @%p1 mov.b32 %r8, 1;
        shfl.sync.idx.b32 %r9, %r8, 0, 31, -1;""",
    "in the part that is not chosen": "setp.lt.u32 %p1, %r0, 9; @%p1 mov.b32 %r8, 1; selp.b32 %r9, 7, %r8, %p1;",
    "in a byte that is picked": "mov.b32 %r7, 1; prmt.b32 %r6, %r7, %r8, 0x7610; prmt.b32 %r9, %r6, 0, 0x5430;",
    "in the sign of a byte": "mov.b32 %r7, 1; prmt.b32 %r9, %r7, %r8, 0xf210;",
    "in the half that is packed": "mov.b16 %h1, 5; mov.b32 %r9, {%h1, %h2};",
    "in the number that is stored": """mov.b32 %r6, 0f3F800000; cvt.rn.satfinite.e4m3x2.f32 %h1, %r7, %r6;
        cvt.u32.u16 %r9, %h1;""",
    "in the half that is shifted": "mov.b16 %h1, 5; mov.b32 %r6, {%h2, %h1}; shl.b32 %r9, %r6, 15;",
    "in the half that is shifted down": "mov.b16 %h1, 5; mov.b32 %r6, {%h1, %h2}; shr.u32 %r9, %r6, 9;",
    "in the sign of what is extended": """mov.b16 %h1, 5; mov.b32 %r6, {%h1, %h2}; cvt.s64.s32 %q8, %r6;
        shr.u64 %q9, %q8, 32; cvt.u32.u64 %r9, %q9;""",
    "in the bytes below": "mov.b16 %h1, 5; mov.b32 %r6, {%h2, %h1}; add.u32 %r7, %r6, 9; shr.u32 %r9, %r7, 16;",
    "in a loop, under a guard": """mov.b32 %r7, 0; L: setp.eq.u32 %p2, %r7, 99; @%p2 mov.b32 %r9, 1;
        add.u32 %r7, %r7, 1; setp.lt.u32 %p1, %r7, 3; @%p1 bra L;""",
}


@pytest.mark.parametrize("code", UNWRITTEN.values(), ids=UNWRITTEN)
def test_what_some_thread_has_not_written_is_a_fault(code: str) -> None:
    assert kinds(code + STORE) == ["register unwritten"]


@pytest.mark.parametrize(
    "code",
    [
        "@%p3 mov.b32 %r9, 1;",
        "@%p3 bra B; B:",
        "ld.shared.b32 %r9, [%r8];",
        "shl.b32 %r9, %r8, 2; st.shared.b32 [%r9], %r0;",
    ],
    ids=["guard", "branch", "address", "address that is computed"],
)
def test_a_use_as(code: str) -> None:
    assert "register unwritten" in kinds(code, shared=64)


def test_what_nothing_is_made_of_is_no_fault() -> None:
    assert kinds("add.u32 %r8, %r7, 1; shfl.sync.bfly.b32 %r6, %r8, 1, 31, -1;") == []


ACCUMULATORS = ", ".join(f"%r{n}" for n in range(100, 104))
PRODUCT = f"""
    mov.b32 %r1, 0; shl.b32 %r2, %r0, 4; st.shared.v4.b32 [%r2], {{%r1, %r1, %r1, %r1}};
    fence.proxy.async.shared::cta; bar.sync 0;
    mov.b64 %q4, 0x4000004000010000;
    mov.b32 %r100, 0; mov.b32 %r101, 0; mov.b32 %r102, 0; mov.b32 %r103, 0; setp.eq.u32 %p1, %r1, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{ACCUMULATORS}}}, {{%r1, %r1, %r1, %r1}}, %q4, %p1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
"""
WAIT = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize(
    ("after", "faults"),
    [
        (f"{WAIT} mov.b32 %r9, %r100;", []),
        (f"mov.b32 %r9, %r100; {WAIT}", []),  # a copy of a register, not a use
        ("mov.b32 %r9, %r100;", ["not waited for"]),
        (f"add.f32 %r9, %r100, 0f00000000; {WAIT}", ["not waited for"]),
        ("wgmma.wait_group.sync.aligned 1; mov.b32 %r9, %r103;", ["not waited for"]),
        ("mov.b32 %r100, 5; mov.b32 %r9, %r100;", []),
    ],
)
def test_accumulators_are_used_after_their_wait(after: str, faults: list[str]) -> None:
    assert kinds(PRODUCT + after + STORE, threads=128, shared=2048) == faults
