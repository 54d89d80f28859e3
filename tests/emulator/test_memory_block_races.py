"""Races between blocks: two that touch one address of global memory, of which one writes it."""

import numpy as np
import pytest
from emulated_blocks import Blocks, region

from bench.emulator.memory.global_memory import Regions
from bench.emulator.program.memory_facts import global_unit, guesses, memory_facts, written_parameters

T = 32
THREAD = np.arange(T, dtype=np.uint64)[None]
BLOCK = np.arange(3, dtype=np.uint64)[:, None]
KERNEL = (
    "ld.param.b64 %rd1, [kernel_param_0];",
    "ld.param.b64 %rd2, [kernel_param_1];",
    "ld.global.b32 %r1, [%rd1];",
    "st.global.b32 [%rd2], %r1;",
    "atom.global.gpu.acq_rel.cas.b32 %r2, [%rd2], %r3, %r4;",
    "atom.global.gpu.relaxed.add.u32 %r2, [%rd2], %r3;",
    "ld.acquire.gpu.global.b32 %r1, [%rd2];",
    "st.release.gpu.global.b32 [%rd2], %r1;",
    "ld.volatile.global.b32 %r1, [%rd2];",
)
LOAD, STORE, CAS, ADD, ACQUIRE, RELEASE, VOLATILE = range(2, 9)
ONE = np.array([[1]], np.uint32)
ZERO = np.array([[0]], np.uint32)


class Launch:
    """Three blocks on x, which is only read, and y, which is written; y[0] is the lock."""

    def __init__(self) -> None:
        self.x, self.y = np.zeros(1000, np.uint32), np.zeros(1000, np.uint32)
        self.regions = Regions([region(self.x, "x"), region(self.y, "y")])
        arrays = {"kernel_param_0": self.x, "kernel_param_1": self.y}
        self.params = {name: np.array([[a.ctypes.data]], np.uint64) for name, a in arrays.items()}
        self.m = self.blocks(3, 0)

    def blocks(self, count: int, first: int) -> Blocks:
        return Blocks(KERNEL, count, T, regions=self.regions, first=first, params=self.params)

    def load(self, place: np.ndarray, i: int = LOAD, m: Blocks | None = None, array: str = "y") -> None:
        (m or self.m).load_global(i, getattr(self, array).ctypes.data + 4 * place, None, 4, 1, None)

    def store(self, place: np.ndarray, i: int = STORE, m: Blocks | None = None) -> None:
        (m or self.m).store_global(i, self.y.ctypes.data + 4 * place, None, 4, [ONE])

    def atomic(self, block: int, i: int, operation: str, values: list[np.ndarray], order: str) -> None:
        self.m.atomic_global(
            i,
            operation,
            "b32",
            self.y.ctypes.data + 0 * THREAD,
            (block == BLOCK) & (THREAD == 0),
            values,
            ZERO,
            order,
            "gpu",
        )

    def only(self, block: int) -> None:
        """From now on the others wait."""
        self.m.active = (block == BLOCK) & np.ones((3, T), bool)


OWN = 100 * BLOCK + THREAD + 1
SHARED = THREAD + 1


def test_each_block_its_own() -> None:
    launch = Launch()
    launch.store(OWN)
    launch.load(OWN)
    launch.store(OWN)
    launch.load(SHARED, array="x")
    assert not launch.m.faults
    assert launch.regions.races and not any(r.name == "x" for r in launch.regions.races.records)


def test_two_blocks_write_one_address() -> None:
    launch = Launch()
    launch.store(SHARED)
    assert launch.m.kinds() == ["blocks race"]


@pytest.mark.parametrize("first, second", [("store", "load"), ("load", "store"), ("store", "store")])
def test_blocks_that_run_one_after_the_other(first: str, second: str) -> None:
    launch = Launch()
    getattr(launch, first)(OWN)
    later = launch.blocks(1, 3)
    getattr(launch, second)(OWN[:1] + 500, m=later)
    assert not later.faults
    getattr(launch, second)(OWN[1:2], m=later)
    assert later.kinds() == ["blocks race"]
    assert "block 3" in later.faults[0][2] and "block 1" in later.faults[0][2]


def test_several_readers_then_a_writer() -> None:
    launch = Launch()
    launch.load(SHARED)
    launch.only(0)
    launch.store(SHARED)
    assert launch.m.kinds() == ["blocks race"]


def test_atomics_may_meet_but_no_other_access() -> None:
    launch = Launch()
    place = launch.y.ctypes.data + 4 * SHARED
    launch.m.atomic_global(ADD, "add", "u32", place, None, [ONE], None, "relaxed", "gpu")
    assert not launch.m.faults and (launch.y[1 : T + 1] == 3).all()
    launch.load(SHARED)
    assert launch.m.kinds() == ["blocks race"]
    launch.m.faults.clear()
    launch.store(OWN)
    launch.m.atomic_global(ADD, "add", "u32", place, None, [ONE], None, "relaxed", "gpu")
    assert launch.m.kinds() == ["blocks race"]


@pytest.mark.parametrize(
    "order, barriers, right",
    [
        ("acq_rel", "behind before", True),
        ("acq_rel", "before", False),  # only thread 0 knows of the others
        ("acq_rel", "behind", False),  # the others may still be writing
        ("relaxed", "behind before", False),
        ("fenced", "behind before", True),
    ],
)
def test_a_lock(order: str, barriers: str, right: bool) -> None:
    """Thread 0 of block after block takes the lock, all read and write what blocks share, it gives the lock back."""
    launch = Launch()
    used = "relaxed" if order == "fenced" else order
    for block in range(3):
        launch.only(block)
        launch.atomic(block, CAS, "cas", [ZERO, ONE], used)
        if order == "fenced":
            launch.m.global_memory.fence(0, "acq_rel", "gpu")
        if "behind" in barriers:
            launch.m.barrier_shared(0)
        launch.load(SHARED)
        launch.store(SHARED)
        if "before" in barriers:
            launch.m.barrier_shared(0)
        if order == "fenced":
            launch.m.global_memory.fence(0, "acq_rel", "gpu")
        launch.atomic(block, CAS, "exch", [ZERO], used)
    assert launch.m.kinds() == ([] if right else ["blocks race"])


def test_a_lock_that_is_not_taken() -> None:
    """The value that a failed compare-and-swap sees is no release: block 1 goes on though block 0 has the lock."""
    launch = Launch()
    launch.only(0)
    launch.atomic(0, CAS, "cas", [ZERO, ONE], "acq_rel")
    launch.store(SHARED)
    launch.only(1)
    launch.atomic(1, CAS, "cas", [ZERO, ONE], "acq_rel")
    launch.load(SHARED)
    assert launch.m.kinds() == ["blocks race"]


@pytest.mark.parametrize(
    "load, store, right", [(ACQUIRE, RELEASE, True), (VOLATILE, RELEASE, False), (ACQUIRE, STORE, False)]
)
def test_a_flag(load: int, store: int, right: bool) -> None:
    launch = Launch()
    launch.only(0)
    launch.store(SHARED)
    launch.store(0 * BLOCK, store)
    launch.only(2)
    launch.load(0 * BLOCK, load)
    launch.load(SHARED)
    assert launch.m.kinds() == ([] if right else ["blocks race"])


def test_the_last_block_adds_up() -> None:
    """Each block writes its part and counts; the last one, which sees the count of all, reads all parts."""
    launch = Launch()
    launch.store(OWN)
    launch.m.barrier_shared(0)
    for block in range(3):
        launch.atomic(block, ADD, "add", [ONE], "acq_rel")
    launch.m.barrier_shared(0)
    launch.only(2)
    for part in range(3):
        launch.load(OWN[part : part + 1])
    assert not launch.m.faults
    launch.only(0)
    launch.load(OWN[1:2])
    assert launch.m.kinds() == ["blocks race"]


def test_one_thread_needs_no_barrier() -> None:
    launch = Launch()
    first = (THREAD == 0) & np.ones((3, T), bool)
    for block in range(3):
        launch.m.active = (block == BLOCK) & first
        launch.atomic(block, CAS, "cas", [ZERO, ONE], "acq_rel")
        launch.load(SHARED)
        launch.store(SHARED)
        launch.atomic(block, CAS, "exch", [ZERO], "acq_rel")
    assert not launch.m.faults


def test_chains_are_followed_where_there_are_some() -> None:
    add = "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], %r2"
    assert not memory_facts([add, "ld.global.b32 %r1, [%rd1]"]).releases
    assert not memory_facts(["st.global.b32 [%rd1], %r1", add.replace("acq_rel", "relaxed")]).releases
    assert memory_facts(["st.global.b32 [%rd1], %r1", add]).releases
    assert memory_facts(["st.global.b32 [%rd1], %r1", "fence.acq_rel.gpu"]).releases
    assert memory_facts(["st.global.b32 [%rd1], %r1", "fence.sc.sys"]).releases
    assert memory_facts(["st.global.b32 [%rd1], %r1", "membar.gl"]).releases


def test_the_first_guess_of_a_loop_of_swaps_is_no_race() -> None:
    load, swap = "ld.global.b32 %r1, [%rd1]", "atom.acq_rel.gpu.global.cas.b32 %r4, [%rd1], {}, %r3"
    assert guesses([load, swap.format("%r1")]) == {0}
    assert guesses(["mov.b32 %r2, %r1", load, "mov.b32 %r2, %r4", swap.format("%r2")]) == {1}
    assert not guesses([load, swap.format("%r5")]) and not guesses(["ld.global.b32 %r1, [%rd2]", swap.format("%r1")])


def test_written_parameters() -> None:
    text = """
        ld.param.b64 %rd1, [kernel_param_0]
        ld.param.b64 %rd2, [kernel_param_1]
        ld.param.b64 %rd3, [kernel_param_2]
        ld.param.b32 %r1, [kernel_param_3]
        mov.u32 %r2, %ctaid.x
        mad.lo.s32 %r3, %r2, %r1, %r2
        mad.wide.s32 %rd4, %r3, 4, %rd1
        mad.wide.s32 %rd5, %r3, 4, %rd2
        selp.b64 %rd6, %rd5, %rd3, %p1
        ld.global.v2.b32 {%r4, %r5}, [%rd4]
        st.global.v2.b32 [%rd6+16], {%r4, %r5}
        atom.shared.add.u32 %r6, [%r3], %r4
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    found = written_parameters(lines)
    assert found and found >= {"kernel_param_1", "kernel_param_2"} and "kernel_param_0" not in found
    assert global_unit(lines) == 4
    loaded = ["ld.param.b64 %rd1, [kernel_param_0]", "ld.global.b64 %rd2, [%rd1]", "st.global.b8 [%rd2], %rs1"]
    assert written_parameters(loaded) is None
    assert global_unit(loaded) == 1
