"""Instructions of a whole warp: shuffles, votes, matches, reductions; after the programs of the PTX manual."""

from typing import Any

import numpy as np
import pytest
from ptx_runner import compute
from test_ptx_integers import arguments, signed

WARPS = 6  # 64 threads a block, so three blocks of two warps


def values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, 32 * WARPS).astype(np.uint32)


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The lane that a thread reads, and its predicate: the program of the manual."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    most = (lane & segment) | (clamp & ~segment)
    least = lane & segment
    if mode == "up":
        j, inside = lane - b, lane - b >= most
    else:
        j = {"down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
        inside = j <= most
    return (j if inside else lane), inside


CLAMPS = {"up": (0, 0x1800, 0x1C00, 0x1E00), "down": (0x1F, 0x181F, 0x1C1F, 0x10), "bfly": (0x1F, 0x181F, 0x1C1F, 0x0F)}
CLAMPS["idx"] = CLAMPS["bfly"]


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    """Where the predicate is false the value is inverted, so that both are seen."""
    a = values()
    for b in (0, 1, 5, 16, 31):
        for c in CLAMPS[mode]:
            code = f"shfl.sync.{mode}.b32 {{d}}|%p1, {{a}}, {b}, {c}, 0xffffffff; @!%p1 not.b32 {{d}}, {{d}};"
            lanes, inside = np.array([shuffled(mode, n % 32, b, c) for n in range(len(a))]).T
            value = a[np.arange(len(a)) // 32 * 32 + lanes]
            assert (compute(code, np.uint32, a) == np.where(inside, value, ~value)).all(), (b, c)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_by_registers(mode: str) -> None:
    a, b = values(), values(1)
    c = np.random.default_rng(0).choice(np.array(CLAMPS[mode], np.uint32), len(a))
    got = compute(f"shfl.sync.{mode}.b32 {{d}}|%p0, {{a}}, {{b}}, {{c}}, -1;", np.uint32, a, b, c)
    want = [shuffled(mode, n % 32, int(b[n]), int(c[n]))[0] for n in range(len(a))]
    assert (got == [a[n - n % 32 + lane] for n, lane in enumerate(want)]).all()


def test_shuffles_among_some_lanes() -> None:
    a = values()
    code = "and.b32 %r100, %r0, 1; setp.eq.u32 %p1, %r100, 0; mov.u32 {d}, 9;"
    got = compute(code + "@%p1 shfl.sync.bfly.b32 {d}, {a}, 2, 0x1f, 0x55555555;", np.uint32, a)
    lane = np.arange(len(a))
    assert (got == np.where(lane % 2 == 0, a[lane ^ 2], 9)).all()


def bits_of(flags: np.ndarray) -> np.ndarray:
    """[warps, 32] of flags -> the mask of each thread's warp."""
    mask = (flags.reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
    return mask.repeat(32).astype(np.uint32)


def by_warp(x: Any) -> np.ndarray:
    """A row for each warp -> a row for each thread."""
    return x.repeat(32)


def test_votes() -> None:
    a = values() % np.uint32(7)
    a[:32], a[32:64] = 0, 3
    flags = a < 3
    rows = flags.reshape(-1, 32)
    start = "setp.lt.u32 %p1, {a}, 3; "
    assert (compute(start + "vote.sync.ballot.b32 {d}, %p1, -1;", np.uint32, a) == bits_of(flags)).all()
    assert (compute(start + "vote.sync.ballot.b32 {d}, !%p1, -1;", np.uint32, a) == bits_of(~flags)).all()
    assert (compute(start + "vote.sync.all.pred %p0, %p1, -1;", np.uint32, a) == by_warp(rows.all(1))).all()
    assert (compute(start + "vote.sync.any.pred %p0, %p1, -1;", np.uint32, a) == by_warp(rows.any(1))).all()
    alike = by_warp(rows.all(1) | ~rows.any(1))
    assert (compute(start + "vote.sync.uni.pred %p0, %p1, -1;", np.uint32, a) == alike).all()


def test_votes_and_reductions_among_some_lanes() -> None:
    """Lanes without a guard take no part."""
    a = values()
    lane = np.arange(len(a)) % 32
    start = "and.b32 %r100, %r0, 3; setp.eq.u32 %p1, %r100, 0; setp.gt.u32 %p2, {a}, 0x70000000; mov.u32 {d}, 9; "
    got = compute(start + "@%p1 vote.sync.ballot.b32 {d}, %p2, 0x11111111;", np.uint32, a)
    assert (got == np.where(lane % 4 == 0, bits_of((a > 0x70000000) & (lane % 4 == 0)), 9)).all()
    got = compute(start + "@%p1 redux.sync.max.u32 {d}, {a}, 0x11111111;", np.uint32, a)
    most = by_warp(np.where(lane % 4 == 0, a, 0).reshape(-1, 32).max(1))
    assert (got == np.where(lane % 4 == 0, most, 9)).all()
    got = compute(start + "@%p1 activemask.b32 {d};", np.uint32, a)
    assert (got == np.where(lane % 4 == 0, 0x11111111, 9)).all()


def test_active_lanes_in_a_branch() -> None:
    a = values()
    code = "and.b32 %r100, %r0, 1; setp.ne.u32 %p1, %r100, 0; @%p1 bra ODD; activemask.b32 {d}; bra END;\n"
    code += "ODD: activemask.b32 {d}; add.u32 {d}, {d}, 1;\nEND:"
    lane = np.arange(len(a)) % 32
    assert (compute(code, np.uint32, a) == np.where(lane % 2 == 0, 0x55555555, 0xAAAAAAAB)).all()


def test_reductions() -> None:
    a = values()
    rows = a.reshape(-1, 32)
    operations = {
        "add.u32": rows.sum(1, dtype=np.uint32), "add.s32": rows.sum(1, dtype=np.uint32),
        "min.u32": rows.min(1), "max.u32": rows.max(1),
        "min.s32": rows.view(np.int32).min(1).view(np.uint32), "max.s32": rows.view(np.int32).max(1).view(np.uint32),
        "and.b32": np.bitwise_and.reduce(rows, 1), "or.b32": np.bitwise_or.reduce(rows, 1),
        "xor.b32": np.bitwise_xor.reduce(rows, 1),
    }  # fmt: skip
    for name, want in operations.items():
        assert (compute(f"redux.sync.{name} {{d}}, {{a}}, 0xffffffff;", np.uint32, a) == by_warp(want)).all(), name
    masked = rows & np.uint32(0xFF)
    got = compute("or.b32 %r100, {a}, 0xffffff00; redux.sync.and.b32 {d}, %r100, -1;", np.uint32, a)
    assert (got == by_warp(np.bitwise_and.reduce(masked, 1) | np.uint32(0xFFFFFF00))).all()


def test_matches() -> None:
    a = values() % np.uint32(5)
    a[:32] = 4
    rows = a.reshape(-1, 32)
    same = np.array([[sum(1 << k for k in range(32) if row[k] == x) for x in row] for row in rows]).ravel()
    assert (compute("match.any.sync.b32 {d}, {a}, -1;", np.uint32, a) == same).all()
    alike = by_warp((rows == rows[:, :1]).all(1))
    assert (compute("match.all.sync.b32 {d}|%p0, {a}, -1;", np.uint32, a) == np.where(alike, 0xFFFFFFFF, 0)).all()
    assert (compute("match.all.sync.b32 %r100|%p0, {a}, -1;", np.uint32, a) == alike).all()
    wide = a.astype(np.uint64) << np.uint64(33)
    assert (compute("match.any.sync.b64 {d}, {a}, -1;", np.uint32, wide) == same).all()


def test_one_lane_is_elected() -> None:
    """Which lane the manual leaves open, but it is one, and all know it."""
    a = values()
    leader = compute("elect.sync {d}|%p0, 0xffffffff;", np.uint32, a)
    chosen = compute("elect.sync _|%p0, 0xffffffff;", np.uint32, a).reshape(-1, 32)
    assert (chosen.sum(1) == 1).all() and (leader.reshape(-1, 32) == chosen.argmax(1)[:, None]).all()


def test_sums_by_shuffles_as_triton_writes_them() -> None:
    (a,) = (x[: 32 * WARPS] for x in arguments(32, 1))
    a = np.resize(a, 32 * WARPS)
    code = "mov.b32 {d}, {a};\n"
    for step in (16, 8, 4, 2, 1):
        code += f"shfl.sync.bfly.b32 %r100, {{d}}, {step}, 31, -1; add.s32 {{d}}, {{d}}, %r100;\n"
    want = [sum(signed(x, 32) for x in row) & 0xFFFFFFFF for row in a.reshape(-1, 32).tolist()]
    assert (compute(code, np.uint32, a) == by_warp(np.array(want))).all()
