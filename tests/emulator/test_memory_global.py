"""Global memory of emulated blocks: what is read and written, faults, atomics, sectors."""

from typing import Any

import numpy as np
import pytest
from emulated_blocks import Blocks, region

from bench.emulator.memory.coalescing import count_sectors
from bench.emulator.memory.global_memory import Regions

T = 64
THREAD = np.arange(T, dtype=np.uint64)[None]
BLOCK = np.arange(3, dtype=np.uint64)[:, None]
LOAD, STORE, ATOMIC, MATRIX = range(4)
TEXTS = ("ld.global.b8 %rs1, [%rd1]", "st.global.b16 [%rd1], %rs1", "atom.global.gpu.relaxed.add.u32 %r1, [%rd1], %r2")
OLD = [np.array([[9]], np.uint16)]


def blocks(*arrays: np.ndarray, valid: np.ndarray | None = None) -> Blocks:
    """Three blocks with these arrays as global memory, the first with holes."""
    names = "xyz"
    regions = Regions(region(a, names[n], valid if n == 0 else None) for n, a in enumerate(arrays))
    return Blocks(TEXTS, 3, T, regions=regions)


def at(array: np.ndarray, byte: np.ndarray) -> np.ndarray:
    return (np.uint64(array.ctypes.data) + byte).astype(np.uint64)


@pytest.mark.parametrize("width, count", [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (2, 4), (4, 2), (4, 4), (8, 2)])
@pytest.mark.parametrize("pattern", ["rows", "shuffled"])
def test_loads_and_stores(width: int, count: int, pattern: str) -> None:
    rng = np.random.default_rng(width * count)
    size = width * count
    x = rng.integers(0, 256, 3 * T * size, np.uint8)
    y = np.zeros_like(x)
    m = blocks(x, y)
    place = BLOCK * T + THREAD if pattern == "rows" else rng.permutation(3 * T).reshape(3, T).astype(np.uint64)
    values = m.load_global(LOAD, at(x, place * size), None, width, count, None)
    elements = x.view(f"u{width}").reshape(-1, count)
    assert all((v == elements[place, n]).all() for n, v in enumerate(values))
    m.store_global(STORE, at(y, place * size), None, width, values)
    assert (x == y).all()
    y[:] = 0
    mask = rng.random((3, T)) < 0.5
    old = [np.full((1, 1), 3, f"u{width}")] * count
    kept = m.load_global(LOAD, at(x, place * size), mask, width, count, old)
    assert all((k == np.where(mask, v, 3)).all() for k, v in zip(kept, values))
    m.store_global(STORE, at(y, place * size), mask, width, values)
    assert (y.view(f"u{width}").reshape(-1, count)[place] == np.where(mask[..., None], elements[place], 0)).all()
    assert not m.faults


def test_uniform_addresses_give_one_value_a_block() -> None:
    x = np.arange(100, dtype=np.uint16)
    m = blocks(x)
    assert m.load_global(LOAD, at(x, BLOCK * 2), None, 2, 1, None)[0].tolist() == [[0], [1], [2]]
    assert m.load_global(LOAD, at(x, BLOCK[:1]), None, 2, 1, None)[0].tolist() == [[0]]
    masked = m.load_global(LOAD, at(x, BLOCK * 2), THREAD > 0, 2, 1, OLD)[0]
    assert (masked == np.where(THREAD > 0, BLOCK, 9)).all()
    m.active = np.zeros((3, T), bool)
    m.load_global(LOAD, at(x, BLOCK * 10**6), None, 2, 1, OLD)
    assert not m.faults


def test_a_request_that_touches_two_arrays() -> None:
    x, y = np.arange(100, dtype=np.uint16), np.arange(1000, 1100, dtype=np.uint16)
    m = blocks(x, y)
    place = np.where(THREAD % 2 == 0, at(x, THREAD * 2), at(y, THREAD * 2))
    (values,) = m.load_global(LOAD, place, None, 2, 1, None)
    assert (values == THREAD + 1000 * (THREAD % 2)).all()
    m.store_global(STORE, place, THREAD < 10, 2, [np.array([[5]], np.uint16)])
    assert x[:12].tolist() == [5, 1, 5, 3, 5, 5, 5, 7, 5, 9, 10, 11]
    assert y[1:11:2].tolist() == [5] * 5 and y[11] == 1011 and x[1] == 1


@pytest.mark.parametrize("offset", [-2, 2 * 100 - 2 * T + 2])
@pytest.mark.parametrize("alike", [True, False])
def test_out_of_bounds(offset: int, alike: bool) -> None:
    x = np.arange(100, dtype=np.uint16)
    m = blocks(x)
    step = THREAD if alike else THREAD + (BLOCK * 0)
    place = at(x, step * 2 + np.uint64(offset % 2**64))
    inside = (THREAD > 0) if offset < 0 else (THREAD < T - 1)
    (value,) = m.load_global(LOAD, place, inside, 2, 1, OLD)
    assert not m.faults
    (value,) = m.load_global(LOAD, place, None, 2, 1, OLD)
    assert m.kinds() == ["out of bounds"] and "of x" in m.faults[0][2]
    assert (value == np.where(inside, (place - np.uint64(x.ctypes.data)) // 2, 9)).all()
    m.faults.clear()
    before = x.copy()
    m.store_global(STORE, at(x, THREAD * 2 + np.uint64(10**12)), None, 2, [np.array([[1]], np.uint16)])
    assert m.kinds() == ["out of bounds"] and (x == before).all()
    empty = Blocks(TEXTS, 3, T)
    empty.load_global(LOAD, place, None, 2, 1, OLD)
    assert empty.kinds() == ["out of bounds"]


def test_between_elements() -> None:
    x = np.arange(256, dtype=np.uint16)
    valid = np.repeat((np.arange(256) % 4 < 2) & (np.arange(256) >= 16), 2)  # pairs of elements between pairs of holes
    m = blocks(x, valid=valid)
    pairs = 40 + 8 * (THREAD % 16)
    (value,) = m.load_global(LOAD, at(x, pairs), None, 2, 1, OLD)
    assert (value == pairs // 2).all()
    m.load_global(LOAD, at(x, pairs), None, 4, 1, OLD)
    m.load_global(LOAD, at(x, pairs + 4), THREAD < 0, 2, 1, OLD)
    assert not m.faults
    m.load_global(STORE, at(x, pairs), None, 8, 1, [OLD[0].astype(np.uint64)])
    m.load_global(LOAD, at(x, 40 + 2 * THREAD), None, 2, 1, OLD)
    assert [(i, kind) for i, kind, _ in m.faults] == [(STORE, "between elements"), (LOAD, "between elements")]
    m.faults.clear()
    m.store_global(STORE, at(x, pairs + 6), None, 2, OLD)
    assert m.kinds() == ["between elements"] and (x == np.arange(256)).all()
    m.faults.clear()
    m.load_global(LOAD, at(x, 0 * THREAD), None, 2, 1, OLD)
    assert m.kinds() == ["out of bounds"]  # elements begin behind it


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_misaligned(size: int) -> None:
    x = np.zeros(4096, np.uint8)
    skew = np.uint64(-x.ctypes.data % 16)
    m = blocks(x)
    width = min(size, 8)
    old = [np.zeros((1, 1), f"u{width}")] * (size // width)
    m.load_global(LOAD, at(x, skew + THREAD * size), None, width, size // width, old)
    m.load_global(LOAD, at(x, skew + THREAD * size + 1), THREAD < 0, width, size // width, old)
    assert not m.faults
    m.load_global(LOAD, at(x, skew + THREAD * size + size // 2), None, width, size // width, old)
    assert m.kinds() == ["misaligned"]
    m.faults.clear()
    m.load_global(LOAD, at(x, skew + THREAD * size + np.where(THREAD == 3, 1, 0)), None, width, size // width, old)
    m.load_global(LOAD, at(x, skew + THREAD * size + np.where(BLOCK == 2, 1, 0)), None, width, size // width, old)
    assert m.kinds() == ["misaligned"]


def definition(operation: str, a: Any, b: Any, c: Any) -> Any:
    """One atomic operation on numbers, as the manual has it."""
    match operation:
        case "add":
            return a + b
        case "min":
            return min(a, b)
        case "max":
            return max(a, b)
        case "and":
            return a & b
        case "or":
            return a | b
        case "xor":
            return a ^ b
        case "exch":
            return b
        case "cas":
            return c if a == b else a
        case "inc":
            return type(a)(0) if a >= b else a + type(a)(1)
        case "dec":
            return b if a == 0 or a > b else a - type(a)(1)
    raise ValueError(operation)


CASES = [("add", kind) for kind in ("u32", "s32", "u64", "f32", "f64", "f16")]
CASES += [(operation, kind) for operation in ("min", "max") for kind in ("u32", "s32", "u64", "s64")]
CASES += [(operation, kind) for operation in ("and", "or", "xor", "exch", "cas") for kind in ("b32", "b64")]
CASES += [("inc", "u32"), ("dec", "u32")]


@pytest.mark.parametrize("operation, kind", CASES)
def test_atomics_in_the_order_of_blocks_and_threads(operation: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    dtype = np.dtype({"b": "u", "s": "i"}.get(kind[0], kind[0]) + str(int(kind[1:]) // 8))
    raw = f"u{dtype.itemsize}"
    x = rng.integers(0, 8, 8).astype(dtype)
    values = [rng.integers(-4 if kind[0] == "s" else 0, 8, (3, T)).astype(dtype) for _ in range(2)]
    expected, expected_old = x.copy(), np.full((3, T), 99, dtype)
    mask = rng.random((3, T)) < 0.8
    place = rng.integers(0, 8, (3, T)).astype(np.uint64)
    for block, thread in np.argwhere(mask):
        to, a, b = place[block, thread], values[0][block, thread], values[1][block, thread]
        expected_old[block, thread] = expected[to]
        expected[to] = definition(operation, expected[to], a, b)
    m = blocks(x)
    operands = [v.view(raw) for v in values[: 2 if operation == "cas" else 1]]
    old = np.array([[99]], dtype).view(raw)
    address = at(x, place * np.uint64(dtype.itemsize))
    got = m.atomic_global(ATOMIC, operation, kind, address, mask, operands, old, "relaxed", "gpu")
    assert (x == expected).all() and (got.view(dtype) == expected_old).all()
    assert not m.faults


@pytest.mark.parametrize("kind", ["bf16", "f16x2", "bf16x2"])
def test_atomic_sums_of_halves(kind: str) -> None:
    import torch

    dtype = torch.bfloat16 if kind.startswith("bf") else torch.float16
    each = 2 if kind.endswith("x2") else 1
    terms = torch.randn(3, T, each, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = torch.zeros(each, dtype=dtype)
    for block in range(3):
        for thread in range(T):
            total = total + terms[block, thread]
    x = np.zeros(2, f"u{2 * each}")
    m = blocks(x)
    bits = terms.view(torch.uint16).numpy().view(f"u{2 * each}")[..., 0]
    m.atomic_global(ATOMIC, "add", kind, at(x, 0 * THREAD), None, [bits], None, "relaxed", "gpu")
    assert (x[:1].view(np.uint16) == total.view(torch.uint16).numpy()).all()


@pytest.mark.parametrize(
    "place, size, counted",
    [
        (THREAD * 4, 4, (2, 8, 8, 256)),  # coalesced
        (THREAD * 16, 16, (2, 32, 32, 1024)),
        (THREAD * 2, 2, (2, 4, 4, 128)),
        (THREAD * 8, 4, (2, 16, 8, 256)),  # every other word
        (THREAD * 128, 4, (2, 64, 8, 256)),
        (THREAD * 0, 4, (2, 2, 2, 8)),  # one word
        (THREAD * 4 + 16, 4, (2, 10, 8, 256)),  # off the sectors' bounds
        ((THREAD * 7 % 64) * 4, 4, (2, 16, 8, 256)),  # shuffled over twice the sectors
    ],
)
def test_sectors(place: np.ndarray, size: int, counted: tuple[int, int, int, int]) -> None:
    assert count_sectors(np.uint64(1 << 40) + place, None, size) == counted
    x = np.zeros(20000, np.uint8)
    start = np.uint64(-x.ctypes.data % 128)
    m = blocks(x)
    width = min(size, 8)
    old = [np.zeros((1, 1), f"u{width}")] * (size // width)
    names = ("requests", "sectors", "fewest_sectors", "bytes")
    for step in (128, 64, 4 * size):  # of each block; the last is off the sectors' bounds
        m.counts.clear()
        address = at(x, start + place + BLOCK * np.uint64(step))
        for _ in range(2):
            m.load_global(LOAD, address, None, width, size // width, old)
        m.load_global(LOAD, address, THREAD < 0, width, size // width, old)
        slow = count_sectors(address, None, size)
        assert [m.counts[LOAD, name] for name in names] == [2 * n for n in slow]
        assert step != 128 or slow == tuple(3 * n for n in counted)
    m.counts.clear()
    m.load_global(LOAD, at(x, start + place), THREAD < 32, width, size // width, old)
    assert m.counts[LOAD, "requests"] == 3
    assert m.counts[LOAD, "fewest_sectors"] == 3 * counted[2] // 2
