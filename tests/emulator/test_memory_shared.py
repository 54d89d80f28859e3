"""Shared memory of emulated blocks: what is read, what is counted."""

from typing import Any

import numpy as np
import pytest
from emulated_blocks import Blocks, addresses, region

from bench.emulator.memory.global_memory import Regions
from bench.emulator.program.memory_facts import shared_unit

LANE = np.arange(64, dtype=np.uint32)
WORDS = LANE[None] + np.arange(3, dtype=np.uint32)[:, None] * 1000  # [blocks, threads]


def blocks(*texts: str, **options: Any) -> Blocks:
    return Blocks(texts or ("st.shared.b32", "ld.shared.b32"), **{"blocks": 3, **options})


@pytest.mark.parametrize("width, count", [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (2, 4), (4, 2), (4, 4), (8, 2)])
def test_what_was_stored_is_loaded(width: int, count: int) -> None:
    rng = np.random.default_rng(width * count)
    m = blocks(f"st.shared.v{count}.b{8 * width}")
    values = [rng.integers(0, 2 ** (8 * width - 1), (3, 64)).astype(f"u{width}") for _ in range(count)]
    at = addresses(rng.permutation(64) * width * count)
    m.store_shared(0, at, None, width, values)
    m.barrier_shared(0)
    loaded = m.load_shared(0, at, None, width, count, None)
    assert all((a == b).all() for a, b in zip(values, loaded, strict=True))
    memory = m.shared_memory.bytes[:, : 64 * width * count].copy().view(f"u{width}").reshape(3, 64, count)
    assert (memory[:, at[0] // (width * count), count - 1] == values[-1]).all()
    assert not m.faults


def test_masked_threads_keep_what_they_have() -> None:
    m = blocks()
    mask = LANE[None] % 3 == 0
    m.store_shared(0, addresses(4 * LANE), None, 4, [WORDS])
    m.store_shared(0, addresses(4 * LANE), mask, 4, [WORDS + np.uint32(7)])
    old = np.array([[5]], np.uint32)
    (loaded,) = m.load_shared(1, addresses(4 * LANE), mask, 4, 1, [old])
    assert (loaded == np.where(mask, WORDS + 7, 5)).all()
    m.active = np.broadcast_to(LANE < 10, (3, 64))
    (loaded,) = m.load_shared(1, addresses(4 * LANE), mask, 4, 1, [old])
    assert (loaded == np.where(mask & (LANE < 10), WORDS + 7, 5)).all()
    assert not m.faults


def test_uniform_addresses_give_one_value_a_block() -> None:
    m = blocks()
    m.store_shared(0, addresses(4 * LANE), None, 4, [WORDS])
    m.barrier_shared(0)
    (loaded,) = m.load_shared(1, addresses(12), None, 4, 1, None)
    assert loaded.tolist() == [[3], [1003], [2003]]
    (loaded,) = m.load_shared(1, np.array([[4], [8], [12]], np.uint32), None, 4, 1, None)
    assert loaded.tolist() == [[1], [1002], [2003]]
    assert not m.faults


def test_addresses_of_each_block_and_blocks_that_part() -> None:
    m = blocks()
    at = addresses([4 * np.roll(LANE, n) for n in range(3)])
    m.store_shared(0, at, None, 4, [WORDS])
    m.barrier_shared(0)
    (loaded,) = m.load_shared(1, addresses(4 * LANE), None, 4, 1, None)
    assert (loaded == [np.roll(WORDS[n], -n) for n in range(3)]).all()
    part = Blocks(("st.shared.b32", "ld.shared.b32"), blocks=2)
    part.shared_memory = m.shared_memory.select(part, np.array([True, False, True]))
    (loaded,) = part.load_shared(1, at[[0, 2]], None, 4, 1, None)
    assert (loaded == WORDS[[0, 2]]).all()
    assert not m.faults and not part.faults


def test_cp_async_copies_and_fills_with_zeros() -> None:
    source = np.arange(256, dtype=np.uint32)
    m = Blocks(("cp.async.cg.shared.global [a], [b], 0x10;",), regions=Regions([region(source)]))
    at = source.ctypes.data + np.uint64(16) * np.roll(LANE, 5).astype(np.uint64)[None]
    sizes = np.where(LANE[None] % 4 == 1, 0, np.where(LANE[None] % 4 == 2, 7, 16)).astype(np.uint32)
    for used in (None, np.where(sizes == 7, np.uint32(16), sizes), sizes):
        m.copy_async_shared(0, addresses(16 * LANE), at, None, 16, used)
        m.commit_copies_shared(0)
        m.wait_copies_shared(0, 0)
        m.barrier_shared(0)
        expected = source.view(np.uint8).reshape(64, 16)[np.roll(LANE, 5)].copy()
        for lane, size in enumerate(np.full(64, 16) if used is None else used[0]):
            expected[lane, size:] = 0
        assert (m.shared_memory.bytes[0].reshape(64, 16) == expected).all()
    assert not m.faults


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices(count: int, transposed: bool) -> None:
    """Lane l holds columns 2 (l mod 4) and one more of row l / 4; of the transposed matrix likewise."""
    rng = np.random.default_rng(count)
    m = blocks("ldmatrix.sync.aligned.m8n8.x4.shared.b16", shared=2048)
    halves = m.shared_memory.views[2]
    halves[:] = rng.integers(0, 2**16, halves.shape)
    assert m.shared_memory.history
    m.shared_memory.history.written[:] = 0
    rows = 16 * rng.permutation(128)[:64]
    m.store_shared(0, addresses(16 * LANE), None, 8, [WORDS.astype(np.uint64)] * 2)
    m.store_shared(0, addresses(1024 + 16 * LANE), None, 8, [WORDS.astype(np.uint64)] * 2)
    halves[:] = rng.integers(0, 2**16, halves.shape)
    m.barrier_shared(0)
    loaded = m.load_matrix_shared(0, addresses(rows), count, transposed)
    for block, thread, n in np.ndindex(3, 64, count):
        lane, warp = thread % 32, thread // 32
        row, column = lane // 4, 2 * (lane % 4)
        first = rows[32 * warp + 8 * n : 32 * warp + 8 * n + 8]  # the addresses of lanes 8 n … are this matrix's rows
        matrix = np.array([halves[block, at // 2 : at // 2 + 8] for at in first])
        matrix = matrix.T if transposed else matrix
        assert int(loaded[n][block, thread]) == int(matrix[row, column]) | int(matrix[row, column + 1]) << 16
    before = m.shared_memory.bytes.copy()
    m.shared_memory.bytes[:] = 0
    m.barrier_shared(0)
    m.store_matrix_shared(0, addresses(rows), None, loaded, transposed)
    for block, thread in np.ndindex(3, 64):
        at = rows[thread]
        stored = m.shared_memory.bytes[block, at : at + 16]
        assert (stored == (before[block, at : at + 16] if thread % 32 < 8 * count else 0)).all()
    assert not m.faults


def test_atomics_are_ordered_by_block_and_thread() -> None:
    m = blocks("st.shared.b32", "atom.shared.add.f32")
    m.store_shared(0, addresses(4 * LANE), None, 4, [np.zeros((1, 1), np.uint32)])
    m.barrier_shared(0)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 64)).astype(np.float32)
    at = addresses(4 * (LANE % 5))
    old = m.atomic_shared(
        1, "add", "f32", at, None, [values.view(np.uint32)], np.zeros((1, 1), np.uint32), "relaxed", "cta"
    )
    sums = np.zeros((3, 5), np.float32)
    for block, thread in np.ndindex(3, 64):
        assert old.view(np.float32)[block, thread] == sums[block, thread % 5]
        sums[block, thread % 5] += values[block, thread]
    assert (m.shared_memory.views[4][:, :5].view(np.float32) == sums).all()
    assert not m.faults


@pytest.mark.parametrize(
    "at, width, count, accesses, wavefronts",
    [
        (4 * LANE, 4, 1, 2, 2),  # a word of each bank
        (0 * LANE, 4, 1, 2, 2),  # the same word
        (2 * LANE, 2, 1, 2, 2),
        (8 * (LANE % 32), 4, 1, 2, 4),  # every other bank
        (128 * (LANE % 4), 4, 1, 2, 8),  # one bank
        (8 * (LANE % 32), 4, 2, 4, 4),  # half a warp at a time
        (16 * LANE, 4, 4, 8, 8),  # a quarter
        (32 * (LANE % 32), 4, 4, 8, 16),
    ],
)
def test_wavefronts(at: np.ndarray, width: int, count: int, accesses: int, wavefronts: int) -> None:
    m = blocks(f"ld.shared.v{count}.b{8 * width}")
    for _ in range(2):
        m.load_shared(0, addresses(at), None, width, count, None)
    m.load_shared(0, addresses(at), np.zeros((1, 64), bool), width, count, [np.zeros((1, 1), f"u{width}")] * count)
    assert m.counts[0, "accesses"] == 2 * 3 * accesses
    assert m.counts[0, "wavefronts"] == 2 * 3 * wavefronts
    half = np.broadcast_to(LANE < 32, (3, 64)) & (np.arange(3)[:, None] > 0)  # a warp of two of the blocks
    m.load_shared(0, addresses(at), half, width, count, [np.zeros((1, 1), f"u{width}")] * count)
    assert m.counts[0, "wavefronts"] == 2 * 3 * wavefronts + 2 * wavefronts // 2


def test_shared_unit() -> None:
    copy = "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;"
    assert shared_unit(["st.shared.v4.b32 [%r1], {%r2}", copy, "ld.global.b8 %r1, [%rd1]"]) == 8
    assert shared_unit([copy, "ld.shared::cta.v2.b16 {%rs1, %rs2}, [%r1]"]) == 4
    assert shared_unit(["atom.shared.add.f32 %f1, [%r1], %f2"]) == 4
    assert shared_unit(["ld.shared.s8 %rs1, [%r1]"]) == 1
    assert shared_unit([]) == 16
