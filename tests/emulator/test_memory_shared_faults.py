"""Faults in shared memory: each is planted and found, and the correct twin of it is silent."""

from typing import NamedTuple

import numpy as np
import pytest
from emulated_blocks import Blocks, addresses, region

from bench.emulator.memory.global_memory import Regions

T = 256
THREAD = np.arange(T, dtype=np.uint32)
MINE = addresses(4 * THREAD)  # a word of each thread
NEIGHBOR = addresses(4 * (THREAD ^ 1))  # of the same warp
OTHER_WARP = addresses(4 * ((THREAD + 32) % T))
VALUE = [THREAD[None]]
ALL = np.array([[0xFFFFFFFF]], np.uint32)
TEXTS = (
    "st.shared.b32 [%r1], %r2",
    "ld.shared.b32 %r1, [%r2]",
    "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "atom.shared.add.u32",
)
STORE, LOAD, COPY, WGMMA, MATRIX, ATOMIC = range(6)


class Plan(NamedTuple):
    m: int = 64
    n: int = 8
    k: int = 16
    d_kind: str = "f32"
    a_kind: str = "bf16"
    b_kind: str = "bf16"
    negate_a: bool = False
    negate_b: bool = False
    transpose_a: bool = False
    transpose_b: bool = False


@pytest.fixture(params=[1, 3, "parted"])
def m(request: pytest.FixtureRequest) -> Blocks:
    """One block; several alike; several with a history each."""
    source = np.arange(T, dtype=np.uint32)
    request.node.source = source
    regions = Regions([region(source)])
    m = Blocks(TEXTS, blocks=1 if request.param == 1 else 3, threads=T, shared=16384, regions=regions)
    m.params["source"] = source
    if request.param == "parted":
        m.active = np.array([[True], [False], [True]]) & np.ones((3, T), bool)
        store(m, addresses(8192 + 4 * THREAD))
        m.barrier_shared(0)
        m.active = None
        assert m.shared_memory.history and m.shared_memory.history.rows == 3
    return m


def store(m: Blocks, at: np.ndarray = MINE, mask: np.ndarray | None = None) -> None:
    m.store_shared(STORE, at, mask, 4, VALUE)


def load(m: Blocks, at: np.ndarray, mask: np.ndarray | None = None) -> None:
    m.load_shared(LOAD, at, mask, 4, 1, VALUE)


def copy(m: Blocks, at: np.ndarray = MINE) -> None:
    source = m.params["source"]
    m.copy_async_shared(COPY, at, source.ctypes.data + 4 * THREAD[None].astype(np.uint64), None, 4, None)
    m.commit_copies_shared(COPY)


def stored(m: Blocks) -> None:
    """All shared memory, written and behind a barrier and a fence."""
    for start in range(0, 16384, 4 * T):
        store(m, addresses(start + 4 * THREAD))
    m.barrier_shared(0)
    m.proxy_fence_shared(0)


def test_reads_of_what_nothing_wrote(m: Blocks) -> None:
    store(m)
    load(m, MINE)
    assert not m.faults
    load(m, addresses(4 * THREAD + 4))
    assert m.kinds() == ["race", "shared memory unwritten"]  # the last thread's; the others' is their neighbor's


def test_a_masked_read_of_what_nothing_wrote(m: Blocks) -> None:
    store(m, mask=THREAD[None] < 32)
    load(m, MINE, THREAD[None] < 32)
    assert not m.faults
    load(m, MINE, THREAD[None] < 33)
    assert m.kinds() == ["shared memory unwritten"]


def test_bounds_and_alignment(m: Blocks) -> None:
    m.store_shared(STORE, addresses(16380), THREAD[None] == 0, 4, VALUE)
    assert not m.faults
    m.store_shared(STORE, addresses(16384), THREAD[None] == 0, 4, VALUE)
    m.store_shared(LOAD, addresses(2 + 4 * THREAD), None, 4, VALUE)
    assert [(i, kind) for i, kind, _ in m.faults] == [(STORE, "out of bounds"), (LOAD, "misaligned")]


@pytest.mark.parametrize("at", [NEIGHBOR, OTHER_WARP], ids=["neighbor", "other warp"])
@pytest.mark.parametrize("barrier", ["none", "warp", "shuffle", "ldmatrix", "block"])
def test_writes_then_reads(m: Blocks, at: np.ndarray, barrier: str) -> None:
    stored(m)
    store(m)
    order(m, barrier)
    load(m, at)
    right = barrier == "block" or (barrier != "none" and at is NEIGHBOR)
    assert m.kinds() == ([] if right else ["race"])


@pytest.mark.parametrize("at", [NEIGHBOR, OTHER_WARP], ids=["neighbor", "other warp"])
@pytest.mark.parametrize("barrier", ["none", "warp", "shuffle", "ldmatrix", "block"])
def test_reads_then_writes(m: Blocks, at: np.ndarray, barrier: str) -> None:
    stored(m)
    load(m, at)
    order(m, barrier)
    store(m)
    right = barrier == "block" or (barrier != "none" and at is NEIGHBOR)
    assert m.kinds() == ([] if right else ["race"])


def order(m: Blocks, barrier: str) -> None:
    if barrier == "warp":
        m.warp_barrier_shared(0, ALL)
    elif barrier == "shuffle":
        m.shared_memory.converge()
    elif barrier == "ldmatrix":
        m.load_matrix_shared(MATRIX, addresses(8192 + 16 * THREAD % 4096), 4, False)
    elif barrier == "block":
        m.barrier_shared(0)


def test_a_read_before_the_last_order_of_a_warp_is_not_forgotten(m: Blocks) -> None:
    stored(m)
    load(m, MINE)
    m.warp_barrier_shared(0, ALL)
    load(m, MINE)
    store(m, MINE)
    assert not m.faults
    store(m, OTHER_WARP)
    assert m.kinds() == ["race"]


def test_several_readers_then_one_of_them_writes(m: Blocks) -> None:
    stored(m)
    load(m, addresses(0))
    store(m, MINE, THREAD[None] == 0)
    assert m.kinds() == ["race"]


def test_writers_of_one_place(m: Blocks) -> None:
    zero = addresses(0)
    m.store_shared(STORE, zero, None, 4, [np.array([[7]], np.uint32)])  # one value
    m.store_shared(STORE, zero, THREAD[None] == 200, 4, [np.array([[7]], np.uint32)])
    assert not m.faults
    m.store_shared(STORE, zero, THREAD[None] == 1, 4, [np.array([[8]], np.uint32)])
    assert m.kinds() == ["race"]


def test_writers_of_one_place_in_one_instruction(m: Blocks) -> None:
    m.store_shared(STORE, addresses(THREAD // 2 * 4), None, 4, VALUE)
    assert m.kinds() == ["race"]


def test_atomics_need_barriers_to_other_accesses(m: Blocks) -> None:
    store(m)
    m.barrier_shared(0)
    for _ in range(2):
        m.atomic_shared(ATOMIC, "add", "u32", addresses(4 * (THREAD % 7)), None, VALUE, None, "relaxed", "cta")
    m.barrier_shared(0)
    load(m, MINE)
    assert not m.faults
    m.atomic_shared(ATOMIC, "add", "u32", addresses(4 * (THREAD % 7)), None, VALUE, None, "relaxed", "cta")
    assert m.kinds() == ["race"]
    m.faults.clear()
    load(m, MINE)
    assert m.kinds() == ["race"]


@pytest.mark.parametrize("at", [MINE, NEIGHBOR, OTHER_WARP], ids=["own", "neighbor", "other warp"])
@pytest.mark.parametrize("waits", ["", "wait", "barrier", "wait barrier", "barrier wait"])
def test_copies_are_waited_for(m: Blocks, at: np.ndarray, waits: str) -> None:
    stored(m)
    copy(m)
    for name in waits.split():
        if name == "wait":
            m.wait_copies_shared(COPY, 0)
        else:
            m.barrier_shared(0)
    load(m, at)
    if "wait" not in waits:
        assert m.kinds() == ["not waited for"]
    else:
        assert m.kinds() == ([] if at is MINE or waits == "wait barrier" else ["race"])


def test_a_group_behind_the_one_waited_for(m: Blocks) -> None:
    copy(m, MINE)
    copy(m, addresses(4096 + 4 * THREAD))
    m.wait_copies_shared(COPY, 1)
    load(m, MINE)
    assert not m.faults
    load(m, addresses(4096 + 4 * THREAD))
    assert m.kinds() == ["not waited for"]


def test_writes_to_where_a_copy_goes_or_others_read(m: Blocks) -> None:
    copy(m)
    store(m)
    assert m.kinds() == ["not waited for"]
    m.faults.clear()
    m.wait_copies_shared(COPY, 0)
    m.barrier_shared(0)
    load(m, OTHER_WARP)
    copy(m)
    assert m.kinds() == ["race"]


def descriptor(start: int) -> np.ndarray:
    return np.array([[start >> 4 | 8 << 16 | 16 << 32]], np.uint64)  # rows of 16 bytes, eight of them in a row


def wgmma(m: Blocks, a: np.ndarray | None = None) -> None:
    zero = [np.zeros((1, 1), np.uint32)] * 4
    b = descriptor(4096)
    m.wgmma_shared(WGMMA, Plan(), zero, descriptor(0) if a is None else a, b, np.ones((1, 1), bool))
    m.wgmma_commit_shared(WGMMA)


def test_wgmma_reads_behind_a_fence_and_a_barrier(m: Blocks) -> None:
    stored(m)
    wgmma(m)
    assert not m.faults


@pytest.mark.parametrize(
    "order, kinds", [("fence", ["race"]), ("barrier", ["no proxy fence"]), ("fence barrier", []), ("barrier fence", [])]
)
def test_wgmma_reads_what_was_stored(m: Blocks, order: str, kinds: list[str]) -> None:
    stored(m)
    store(m)
    for name in order.split():
        if name == "fence":
            m.proxy_fence_shared(0)
        else:
            m.barrier_shared(0)
    wgmma(m)
    assert m.kinds() == kinds


@pytest.mark.parametrize("waits, kinds", [("barrier", ["not waited for"]), ("wait", ["race"]), ("wait barrier", [])])
def test_what_wgmma_reads_is_written_behind_its_wait(m: Blocks, waits: str, kinds: list[str]) -> None:
    stored(m)
    wgmma(m)
    for name in waits.split():
        if name == "wait":
            m.wgmma_wait_shared(WGMMA, 0)
        else:
            m.barrier_shared(0)
    copy(m)
    assert m.kinds() == kinds


def test_wgmma_reads_what_is_being_copied_or_was_never_written(m: Blocks) -> None:
    wgmma(m)
    assert m.kinds() == ["shared memory unwritten"]
    m.faults.clear()
    m.wgmma_wait_shared(WGMMA, 0)
    m.barrier_shared(0)
    stored(m)
    copy(m)
    wgmma(m)
    assert m.kinds() == ["not waited for"]


def test_descriptors_of_a_warp_group(m: Blocks) -> None:
    stored(m)
    groups = np.where(THREAD < 128, descriptor(0), descriptor(8192))
    wgmma(m, groups)
    assert not m.faults
    wgmma(m, np.where(THREAD == 77, descriptor(16), descriptor(0)))
    assert m.kinds() == ["descriptor"]
    m.faults.clear()
    wgmma(m, descriptor(15872))
    assert m.kinds() == ["out of bounds"]


def test_barriers_that_not_every_thread_reaches(m: Blocks) -> None:
    m.active = np.ones((m.blocks, T), bool)
    m.barrier_shared(0)
    m.warp_barrier_shared(0, ALL)
    m.load_matrix_shared(MATRIX, addresses(0), 4, False)
    m.faults.clear()
    m.active[:, 5::32] = False
    m.barrier_shared(0)
    m.barrier_shared(1)
    m.load_matrix_shared(MATRIX, addresses(0), 4, False)
    wgmma(m)
    assert [(i, kind) for i, kind, _ in m.faults if kind == "barrier"] == [
        (0, "barrier"), (1, "barrier"), (MATRIX, "barrier"), (WGMMA, "barrier")
    ]  # fmt: skip
    m.faults.clear()
    m.warp_barrier_shared(0, ALL)
    m.warp_barrier_shared(0, np.array([[0xFFFFFFDF]], np.uint32))
    assert not m.faults
    m.active = None
    m.warp_barrier_shared(0, np.array([[0xFFFFFFDF]], np.uint32))
    assert m.kinds() == ["barrier"]


def test_blocks_go_on_with_their_history(m: Blocks) -> None:
    stored(m)
    store(m)
    copy(m, addresses(4096 + 4 * THREAD))
    keep = np.arange(m.blocks) != 1
    part = Blocks(TEXTS, blocks=int(keep.sum()), threads=T, shared=16384)
    part.shared_memory = m.shared_memory.select(part, keep)
    m.barrier_shared(0)  # of the others
    load(m, OTHER_WARP)
    assert not m.faults
    load(part, OTHER_WARP)
    load(part, addresses(4096 + 4 * THREAD))
    assert part.kinds() == ["not waited for", "race"]
    part.faults.clear()
    part.wait_copies_shared(COPY, 0)
    part.barrier_shared(0)
    load(part, addresses(4096 + 4 * ((THREAD + 32) % T)))
    assert not part.faults
