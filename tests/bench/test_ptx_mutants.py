"""Tests of `bench.ptx_mutants` without the emulator: which instructions separate accesses, and where faults go."""

from collections.abc import Sequence

import numpy as np
import pytest

from bench.emulator.program.ptx import parse
from bench.ptx_mutants.edits import find_edits
from bench.ptx_mutants.products import find_product_waits
from bench.ptx_mutants.separators import SEVERAL, Event, Kind, find_separators

BYTES, BLOCKS = 64, 2


def access(kind: Kind, instruction: int, threads: Sequence[int], bytes_accessed: Sequence[int]) -> Event:
    """Both blocks' access: each thread that of the byte at its place; SEVERAL: of all warps."""
    thread, byte = np.tile(threads, BLOCKS), np.tile(bytes_accessed, BLOCKS)
    row = np.repeat(np.arange(BLOCKS), len(threads))
    return Event(kind, instruction, np.arange(BLOCKS), row, byte, thread, np.where(thread < 0, SEVERAL, thread // 32))


def order(kind: Kind, instruction: int, pending: int = 0) -> Event:
    return Event(kind, instruction, np.arange(BLOCKS), pending=pending)


def separators(*events: Event) -> set[int]:
    return {instruction for instruction, reasons in find_separators(events, BLOCKS, BYTES).items() if reasons}


def test_a_barrier_between_two_threads_separates_them() -> None:
    write, read = access("write", 1, [0, 40], [0, 1]), access("read", 3, [40, 0], [0, 1])
    assert separators(write, order("barrier", 2), read) == {2}


def test_a_barrier_between_accesses_of_one_thread_or_of_readers_separates_nothing() -> None:
    write, same = access("write", 1, [0, 40], [0, 1]), access("read", 3, [0, 40], [0, 1])
    assert separators(write, order("barrier", 2), same, order("barrier", 4), same) == set()


def test_one_of_two_barriers_in_a_row_separates_nothing() -> None:
    write, read = access("write", 1, [0], [0]), access("read", 4, [40], [0])
    assert separators(write, order("barrier", 2), order("barrier", 3), read) == set()


def test_a_barrier_separates_a_read_from_a_later_write() -> None:
    events = [access("write", 1, [0], [0]), order("barrier", 2), access("read", 3, [0, 40], [0, 0])]
    assert separators(*events, order("barrier", 4), access("write", 5, [0], [0])) == {2, 4}


def test_a_warp_barrier_orders_the_threads_of_a_warp_only() -> None:
    write, near, far = access("write", 1, [0], [0]), access("read", 3, [1], [0]), access("read", 3, [40], [0])
    assert separators(write, order("warp barrier", 2), near) == {2}
    with pytest.raises(ValueError, match="read of what another thread wrote"):
        separators(write, order("warp barrier", 2), far)


def test_a_copy_takes_its_wait_and_a_barrier_behind_it() -> None:
    copy, read = access("copy", 1, [0], [0]), access("read", 5, [40], [0])
    committed = order("copies committed", 2)
    assert separators(copy, committed, order("copies awaited", 3), order("barrier", 4), read) == {3, 4}
    with pytest.raises(ValueError, match="read of what another thread wrote"):  # the barrier comes too early
        separators(copy, committed, order("barrier", 4), order("copies awaited", 3), read)


def test_a_wait_leaves_the_latest_groups_under_way() -> None:
    copies = [access("copy", 1, [0], [0]), order("copies committed", 2)]
    copies += [access("copy", 3, [0], [1]), order("copies committed", 4)]
    awaited = order("copies awaited", 5, pending=1)
    assert separators(*copies, awaited, access("read", 6, [0], [0])) == {5}
    with pytest.raises(ValueError, match="read of what is being copied"):
        separators(*copies, awaited, access("read", 6, [0], [1]))


def test_a_tensor_core_reads_behind_a_proxy_fence_until_it_is_waited_for() -> None:
    product = access("tensor core read", 4, [SEVERAL], [0])
    before = [access("write", 1, [0], [0]), order("proxy fence", 2), order("barrier", 3), product]
    committed, awaited = order("products committed", 5), order("products awaited", 6)
    barrier = order("barrier", 7)
    assert separators(*before, committed, awaited, barrier, access("write", 8, [0], [0])) == {2, 3, 6, 7}
    assert separators(*before, committed, awaited, barrier, access("write", 8, [0], [1])) == {2, 3}
    with pytest.raises(ValueError, match="write of what another thread read"):  # another warp may still multiply
        separators(*before, committed, awaited, access("write", 8, [0], [0]))


PTX = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry faulty(.param .u64 faulty_param_0, .param .u32 faulty_param_1)
.reqntid 128
{
    .reg .pred %p<5>;
    .reg .b32 %r<10>;
    .reg .b64 %rd<4>;
    ld.param.b64 %rd1, [faulty_param_0];
    ld.param.b32 %r1, [faulty_param_1];
    mov.u32 %r2, %tid.x;
    setp.lt.s32 %p1, %r2, %r1;
    setp.gt.s32 %p2, %r2, 3;
    setp.lt.s32 %p4, %r2, 5;
    and.pred %p3, %p1, %p4;
    @%p3 ld.global.b32 { %r3 }, [ %rd1 + 0 ];
    selp.b32 %r4, %r3, 0, %p2;
    bar.sync 	0;
    // begin inline asm
    mov.b32 %r5, %r4;
    // end inline asm
    mov.b32 %r6, %r5;
    ret;
}
"""


def test_faults_go_to_barriers_to_masks_that_reach_memory_and_to_copies_by_assembly() -> None:
    edits = list(find_edits(parse(PTX), PTX))
    changed = [(edit.rule.name, edit.instruction.text) for edit in edits]
    assert changed == [
        ("barrier dropped", "bar.sync 0;"),
        ("bound off by one", "setp.lt.s32 %p1, %r2, %r1;"),
        ("bound off by one", "setp.lt.s32 %p4, %r2, 5;"),
        ("weight in 16 bits", "mov.b32 %r5, %r4;"),
    ]
    assert "bar.sync" not in edits[0].apply(PTX)
    assert edits[1].apply(PTX) == PTX.replace("setp.lt.s32 %p1", "setp.le.s32 %p1")
    assert edits[1].apply(PTX.replace("faulty", "other")) == PTX.replace("faulty", "other")
    parse(edits[3].apply(PTX))


def test_a_wait_for_products_is_needed_before_a_use_of_their_accumulators() -> None:
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r5,%r6}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
    product += "\nwgmma.commit_group.sync.aligned;"
    wait = "wgmma.wait_group.sync.aligned 0;"
    use, other = "add.f32 %r9, %r5, %r6;", "add.f32 %r9, %r1, %r2;"

    def needed(*lines: str) -> int:
        start, end = PTX.index("    bar.sync"), PTX.index("    ret;")
        kernel = parse(PTX[:start] + "\n".join(lines) + "\n" + PTX[end:])
        return len(find_product_waits(kernel, [block.index for block in kernel.blocks if block.instructions]))

    assert needed(product, wait, use) == 1
    assert needed(product, wait, other) == 0
    assert needed(product, wait, product) == 0
    assert needed(product, wait, other, wait, use) == 0  # either may be dropped
    assert needed(use, wait, use) == 0


def test_a_wait_that_leaves_a_group_under_way_is_needed_for_the_others_only() -> None:
    products = [f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r{n}}}, %rd1, %rd2, %p1;" for n in (5, 6)]
    commit, wait_one, wait = ("wgmma.commit_group;", *(f"wgmma.wait_group.sync.aligned {n};" for n in (1, 0)))
    uses = [f"mov.b32 %r9, %r{n};" for n in (5, 6)]
    start, end = PTX.index("    bar.sync"), PTX.index("    ret;")

    def needed(*lines: str) -> set[str]:
        kernel = parse(PTX[:start] + "\n".join(lines) + "\n" + PTX[end:])
        ids = find_product_waits(kernel, [block.index for block in kernel.blocks if block.instructions])
        return {x.text for block in kernel.blocks for x in block.instructions if x.id in ids}

    both = (products[0], commit, products[1], commit)
    assert needed(*both, wait_one, uses[0], wait, uses[1]) == {wait_one, wait}
    assert needed(*both, wait_one, wait, uses[1]) == {wait}
    with pytest.raises(ValueError, match="before it waits"):
        needed(*both, wait_one, uses[1])
