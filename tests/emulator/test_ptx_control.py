"""Control flow: threads and blocks that part, meet again, loop differently often, and leave early."""

import numpy as np
from ptx_runner import compute, run_ptx
from test_ptx_integers import arguments


def test_threads_part_and_meet_again() -> None:
    (a,) = arguments(32, 1)
    code = """
    and.b32 %r100, {a}, 3;
    setp.eq.u32 %p1, %r100, 0;
    setp.eq.u32 %p2, %r100, 1;
    @%p1 bra ZERO;
    @%p2 bra ONE;
    mul.lo.u32 {d}, {a}, 3;
    bra END;
ZERO:
    add.u32 {d}, {a}, 10;
    bra END;
ONE:
    not.b32 {d}, {a};
END:
    add.u32 {d}, {d}, 1;
    """
    low = a & 3
    want = np.where(low == 0, a + np.uint32(10), np.where(low == 1, ~a, a * np.uint32(3))) + np.uint32(1)
    assert (compute(code, np.uint32, a) == want).all()


def test_each_thread_loops_as_often_as_it_must() -> None:
    """Steps of the 3 n + 1 sequence until it reaches 1."""
    a = np.random.default_rng(0).integers(1, 200, 256).astype(np.uint32)
    code = """
    mov.u32 {d}, 0;
    mov.u32 %r100, {a};
LOOP:
    setp.eq.u32 %p1, %r100, 1;
    @%p1 bra DONE;
    and.b32 %r101, %r100, 1;
    setp.eq.u32 %p2, %r101, 0;
    @%p2 bra EVEN;
    mad.lo.u32 %r100, %r100, 3, 1;
    bra NEXT;
EVEN:
    shr.u32 %r100, %r100, 1;
NEXT:
    add.u32 {d}, {d}, 1;
    bra.uni LOOP;
DONE:
    """

    def steps(n: int) -> int:
        count = 0
        while n != 1:
            n, count = (n // 2 if n % 2 == 0 else 3 * n + 1), count + 1
        return count

    assert compute(code, np.uint32, a).tolist() == [steps(n) for n in a.tolist()]


def test_nested_loops_with_different_counts() -> None:
    a = np.random.default_rng(0).integers(0, 7, 128).astype(np.uint32)
    b = np.random.default_rng(1).integers(0, 7, 128).astype(np.uint32)
    code = """
    mov.u32 {d}, 0;
    mov.u32 %r100, 0;
OUTER:
    setp.ge.u32 %p1, %r100, {a};
    @%p1 bra DONE;
    mov.u32 %r101, 0;
INNER:
    setp.ge.u32 %p2, %r101, {b};
    @%p2 bra INNER_DONE;
    mad.lo.u32 {d}, %r100, %r101, {d};
    add.u32 %r101, %r101, 1;
    bra INNER;
INNER_DONE:
    add.u32 %r100, %r100, 1;
    bra OUTER;
DONE:
    """
    want = [sum(x * y for x in range(m) for y in range(n)) for m, n in zip(a.tolist(), b.tolist())]
    assert compute(code, np.uint32, a, b).tolist() == want


def test_threads_that_return_early_store_nothing_more() -> None:
    out = np.zeros(128, np.uint32)
    code = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r1, %r1, 64, %r0;
    mad.wide.u32 %q10, %r1, 4, %q0;
    st.global.u32 [%q10], 1;
    setp.gt.u32 %p1, %r0, 20;
    @%p1 ret;
    st.global.u32 [%q10], 2;
    setp.gt.u32 %p2, %r0, 10;
    @%p2 exit;
    st.global.u32 [%q10], 3;
    """
    run_ptx(code, out, threads=64, blocks=2)
    thread = np.arange(128) % 64
    assert (out == np.where(thread > 20, 1, np.where(thread > 10, 2, 3))).all()


def test_blocks_that_take_different_ways() -> None:
    out = np.zeros((5, 32), np.uint32)
    code = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r2, %r1, 32, %r0;
    mad.wide.u32 %q10, %r2, 4, %q0;
    mov.u32 %r3, 0;
    setp.eq.u32 %p1, %r1, 2;
    @%p1 bra STORE;
LOOP:
    add.u32 %r3, %r3, %r1;
    add.u32 %r4, %r3, %r0;
    setp.lt.u32 %p2, %r3, 20;
    setp.ne.and.u32 %p2, %r1, 0, %p2;
    @%p2 bra LOOP;
    add.u32 %r3, %r3, 100;
STORE:
    st.global.u32 [%q10], %r3;
    """
    run_ptx(code, out, blocks=5)

    def total(block: int) -> int:
        if block in (0, 2):
            return 100 * (block == 0)
        return -(-20 // block) * block + 100

    assert (out == np.array([total(n) for n in range(5)])[:, None]).all()


def test_a_barrier_orders_warps_and_a_branch_around_it_is_taken_by_all() -> None:
    out = np.zeros(64, np.uint32)
    code = """
    shl.b32 %r1, %r0, 2;
    st.shared.u32 [%r1], %r0;
    bar.sync 0;
    xor.b32 %r2, %r1, 252;
    ld.shared.u32 %r3, [%r2];
    mad.wide.u32 %q10, %r0, 4, %q0;
    st.global.u32 [%q10], %r3;
    """
    launch = run_ptx(code, out, threads=64, shared=256)
    assert not launch.faults
    assert (out == np.arange(64)[::-1]).all()
    launch = run_ptx(code.replace("bar.sync 0;", ""), out, threads=64, shared=256)
    assert [fault.kind for fault in launch.faults] in (
        ["race"],
        ["shared memory unwritten"],
        ["race", "shared memory unwritten"],
    )
