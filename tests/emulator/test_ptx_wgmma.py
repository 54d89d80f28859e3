"""wgmma: operands in shared memory in every layout of the PTX manual's chapter on descriptors, or A in registers."""

from dataclasses import dataclass

import numpy as np
import pytest
from ptx_runner import run_ptx
from test_ptx_matrices import FRAGMENTS, accumulator, bits_of, registers

MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes of a swizzled row -> bits 62 and 63 of a descriptor
SIZES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}


@dataclass(frozen=True)
class Layout:
    """Where the elements of an operand lie. A row is one of m or n, a column one of k.

    swizzle     bytes of a row of the swizzled pattern, 0 for none
    transposed  rows are contiguous, not columns
    leading, stride  the two offsets of a descriptor, in bytes
    """

    swizzle: int
    transposed: bool
    leading: int
    stride: int

    def place(self, row: int, column: int, size: int) -> int:
        """The byte of an element of `size` bytes, from the operand's beginning."""
        inner, outer = (row, column) if self.transposed else (column, row)
        chunk, byte = divmod(inner * size, 16)  # of 16 bytes, which eight lines of outer ones make a core matrix of
        if self.swizzle == 0:
            along_row, along_column = (chunk, outer // 8) if self.transposed else (outer // 8, chunk)
            return along_row * self.stride + along_column * self.leading + outer % 8 * 16 + byte
        line = outer % 8
        pattern, chunk = divmod(chunk, self.swizzle // 16)
        chunk ^= {128: line, 64: line // 2, 32: line // 4}[self.swizzle]
        return pattern * self.leading + outer // 8 * self.stride + line * self.swizzle + 16 * chunk + byte

    def image(self, matrix: np.ndarray, room: int) -> np.ndarray:
        """The bytes of shared memory that hold a matrix of bits."""
        size, memory = matrix.itemsize, np.zeros(room, np.uint8)
        for (row, column), element in np.ndenumerate(matrix):
            at = self.place(row, column, size)
            assert at + size <= room
            memory[at : at + size] = np.array([element]).view(np.uint8)
        return memory

    def descriptor(self, start: int) -> int:
        assert self.leading % 16 == self.stride % 16 == start % 16 == 0
        return start >> 4 | (self.leading >> 4) << 16 | (self.stride >> 4) << 32 | MODES[self.swizzle] << 62


def layout_of(swizzle: int, transposed: bool, rows: int, columns: int, size: int) -> Layout:
    """A layout with room between its parts."""
    outer = columns if transposed else rows
    if swizzle == 0:
        if transposed:
            return Layout(0, transposed, 128 * (rows // 8) + 256, 128)
        return Layout(0, transposed, 256, 256 * (columns * size // 16) + 128)
    stride = 8 * swizzle
    return Layout(swizzle, transposed, -(-outer // 8) * stride, stride)


def padded(room: int) -> int:
    return -(-room // 1024) * 1024


@dataclass(frozen=True)
class Case:
    n: int = 16
    d: str = "f32"
    a: str = "f16"
    b: str = "f16"
    swizzle_a: int = 128
    swizzle_b: int = 128
    transpose_a: bool = False
    transpose_b: bool = False
    in_registers: bool = False
    steps: int = 1  # along k
    groups: int = 1  # warp groups
    scale: str = "1"  # scale-d of the first step
    negate: tuple[int, int] = (1, 1)


def check(case: Case) -> None:
    size = SIZES[case.a]
    k = 32 // size
    inner = k * case.steps
    rng = np.random.default_rng(0)
    low = 0 if "u8" in (case.a, case.b) else -4
    a = rng.integers(low, 5, (case.groups, 64, inner))
    b = rng.integers(low, 5, (case.groups, case.n, inner))
    start = rng.integers(-9, 9, (case.groups, 64, case.n))
    product = np.einsum("wik,wjk->wij", a, b) * case.negate[0] * case.negate[1]
    want = product + (start if case.scale != "0" else 0)

    layout_a = layout_of(case.swizzle_a, case.transpose_a, 64, inner, size)
    layout_b = layout_of(case.swizzle_b, case.transpose_b, case.n, inner, size)
    room_a, room_b = (
        padded(1 + max(layout.place(r, c, size) + size for r in range(rows) for c in range(inner)))
        for layout, rows in ((layout_a, 64), (layout_b, case.n))
    )
    memory = np.concatenate(
        [
            part
            for w in range(case.groups)
            for part in (layout_a.image(bits_of(a[w], case.a), room_a), layout_b.image(bits_of(b[w], case.b), room_b))
        ]
    )
    each = room_a + room_b
    descriptors = np.zeros((case.groups, case.steps, 2), np.uint64)
    for w in range(case.groups):
        for step in range(case.steps):
            # a step begins at its first element; swizzling goes by the whole address
            at_a, at_b = (
                layout.place(0, step * k, size) if not layout.swizzle or layout.transposed else step * k * size
                for layout in (layout_a, layout_b)
            )
            descriptors[w, step] = layout_a.descriptor(w * each + at_a), layout_b.descriptor(w * each + room_a + at_b)

    # registers: thread 128 w + 32 v + lane has rows 16 v + … of warp group w, as of mma.sync
    held_d = np.zeros((case.groups, 4, 32, case.n // 2), np.int64)
    want_d = held_d.copy()
    _, place_a, count_a, *_ = FRAGMENTS[{4: "m16n8k8 32", 2: "m16n8k16 16", 1: "m16n8k32 8"}[size]]
    held_a = np.zeros((case.groups, 4, 32, case.steps, count_a), np.int64)
    for w, v, lane in np.ndindex(case.groups, 4, 32):
        for i in range(case.n // 2):
            row, column = accumulator(lane // 4, lane % 4, i % 4)
            held_d[w, v, lane, i] = start[w, 16 * v + row, 8 * (i // 4) + column]
            want_d[w, v, lane, i] = want[w, 16 * v + row, 8 * (i // 4) + column]
        for step, i in np.ndindex(case.steps, count_a):
            row, column = place_a(lane // 4, lane % 4, i)
            held_a[w, v, lane, step, i] = a[w, 16 * v + row, step * k + column]
    threads = 128 * case.groups
    before = np.ascontiguousarray(bits_of(held_d, case.d)).view(np.uint32).reshape(threads, -1)
    out = np.zeros_like(before)
    fragments = np.ascontiguousarray(bits_of(held_a, case.a)).view(np.uint32).reshape(threads, -1)

    count, regs_a = before.shape[1], fragments.shape[1] // case.steps
    code = f"""
    shr.u32 %r1, %r0, 7;
    mad.wide.u32 %q10, %r0, {4 * count}, %q0;
    mad.wide.u32 %q11, %r0, {4 * count}, %q1;
    mad.wide.u32 %q12, %r1, {16 * case.steps}, %q2;
    mad.wide.u32 %q13, %r0, {4 * fragments.shape[1]}, %q4;
    setp.ne.u32 %p1, 1, 1;
    setp.eq.u32 %p2, 1, 1;
    """
    for first in range(0, len(memory), 16 * threads):
        code += f"mad.lo.u32 %r2, %r0, 16, {first}; setp.lt.u32 %p3, %r2, {len(memory)};\n"
        code += f"mad.wide.u32 %q14, %r0, 16, %q3; @%p3 ld.global.v4.b32 {registers(3, 4)}, [%q14+{first}];\n"
        code += f"@%p3 st.shared.v4.b32 [%r2], {registers(3, 4)};\n"
    code += "".join(f"ld.global.b32 %r{20 + n}, [%q10+{4 * n}];\n" for n in range(count))
    code += "".join(f"ld.global.b32 %r{200 + n}, [%q13+{4 * n}];\n" for n in range(fragments.shape[1]))
    code += "fence.proxy.async.shared::cta;\nbar.sync 0;\nwgmma.fence.sync.aligned;\n"
    integer = case.d == "s32"
    for step in range(case.steps):
        code += f"ld.global.v2.b64 {{ %q15, %q16 }}, [%q12+{16 * step}];\n"
        left = registers(200 + step * regs_a, regs_a) if case.in_registers else "%q15"
        scale = "%p2" if step or case.scale == "1" else {"0": "%p1"}[case.scale]
        numbers = [scale] if integer else [scale, *map(str, case.negate)]
        if size == 2:
            numbers += (
                [str(int(case.transpose_b))]
                if case.in_registers
                else [str(int(case.transpose_a)), str(int(case.transpose_b))]
            )
        form = f"m64n{case.n}k{k}.{case.d}.{case.a}.{case.b}"
        code += f"wgmma.mma_async.sync.aligned.{form} {registers(20, count)}, {left}, %q16, {', '.join(numbers)};\n"
    code += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    code += "".join(f"st.global.b32 [%q11+{4 * n}], %r{20 + n};\n" for n in range(count))
    launch = run_ptx(code, before, out, descriptors, memory, fragments, threads=threads, shared=len(memory))
    assert not launch.faults, launch.faults[0]
    got = np.ascontiguousarray(out).view(bits_of(held_d, case.d).dtype).reshape(want_d.shape)
    wrong = got != bits_of(want_d, case.d)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.size}, the first at {np.argwhere(wrong)[0]}"


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_every_layout(swizzle: int, transpose_a: bool, transpose_b: bool) -> None:
    check(Case(swizzle_a=swizzle, swizzle_b=swizzle, transpose_a=transpose_a, transpose_b=transpose_b, n=32))


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_steps_along_k_advance_the_address(swizzle: int) -> None:
    check(Case(swizzle_a=swizzle, swizzle_b=swizzle, steps={0: 3, 32: 1, 64: 2, 128: 4}[swizzle]))


@pytest.mark.parametrize("swizzle", [0, 64, 128])
def test_steps_along_k_of_a_transposed_operand(swizzle: int) -> None:
    check(Case(swizzle_b=swizzle, transpose_b=True, steps=2, n=64))


@pytest.mark.parametrize(("swizzle_a", "swizzle_b"), [(128, 0), (32, 128), (0, 64)])
def test_operands_of_different_layouts(swizzle_a: int, swizzle_b: int) -> None:
    check(Case(swizzle_a=swizzle_a, swizzle_b=swizzle_b, transpose_b=True))


@pytest.mark.parametrize("n", [8, 24, 256])
def test_every_width(n: int) -> None:
    check(Case(n=n))


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_in_registers(kind: str, transpose_b: bool) -> None:
    check(Case(a=kind, b=kind, in_registers=True, transpose_b=transpose_b, steps=2, n=64))


TYPES = [
    *[
        ("bf16", "bf16", "f32"),
        ("tf32", "tf32", "f32"),
        ("s8", "u8", "s32"),
        ("e5m2", "e4m3", "f32"),
        ("f16", "f16", "f16"),
    ],
    *[("s8", "s8", "s32"), ("u8", "s8", "s32"), ("e4m3", "e4m3", "f32"), ("e4m3", "e5m2", "f16")],
]


@pytest.mark.parametrize(("types", "in_registers"), [(t, r) for r in (False, True) for t in TYPES[: 5 if r else None]])
def test_every_type(types: tuple[str, str, str], in_registers: bool) -> None:
    a, b, d = types
    check(Case(a=a, b=b, d=d, in_registers=in_registers, steps=2))


@pytest.mark.parametrize("negate", [(-1, 1), (1, -1), (-1, -1)])
def test_factors_of_minus_one(negate: tuple[int, int]) -> None:
    check(Case(negate=negate))


def test_what_the_accumulator_held_can_be_left_out() -> None:
    check(Case(scale="0"))
    check(Case(scale="0", in_registers=True, steps=2))


def test_warp_groups_have_operands_of_their_own() -> None:
    check(Case(groups=2, steps=2, n=24))
    check(Case(groups=2, in_registers=True, swizzle_b=64))
