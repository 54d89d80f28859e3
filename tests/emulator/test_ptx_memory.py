"""Loads, stores, atomics and asynchronous copies of PTX: what they move, by naive loops. What they must not do is
tested with the memories themselves.
"""

from collections.abc import Callable

import numpy as np
import pytest
from exact_numbers import FORMATS, plus, samples
from ptx_runner import compute, run_ptx

THREADS, BLOCKS = 64, 2
INDEX = f"    mov.u32 %r1, %ctaid.x;\n    mad.lo.u32 %r1, %r1, {THREADS}, %r0;\n"


def random_bytes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("space", ["global", "shared", "local"])
@pytest.mark.parametrize(
    ("bits", "count"), [(8, 1), (16, 1), (32, 1), (64, 1), (8, 4), (16, 2), (16, 4), (32, 2), (32, 4), (64, 2)]
)
def test_loads_and_stores_of_every_width(bits: int, count: int, space: str) -> None:
    size = bits // 8 * count
    data = random_bytes((BLOCKS * THREADS, size))
    out = np.zeros_like(data)
    letter = {8: "h", 16: "h", 32: "r", 64: "q"}[bits]
    first = {"h": 1, "r": 10, "q": 12}[letter]
    names = ", ".join(f"%{letter}{first + n}" for n in range(count))
    operand = f"{{ {names} }}" if count > 1 else names
    form = f"{f'v{count}.' if count > 1 else ''}b{bits}"
    code = INDEX + f"mad.wide.u32 %q10, %r1, {size}, %q0; mad.wide.u32 %q11, %r1, {size}, %q1;\n"
    code += f"ld.global.{form} {operand}, [%q10];\n"
    if space == "shared":
        code += f"mul.lo.u32 %r2, %r0, {size}; st.shared.{form} [%r2], {operand};\n"
        code += "".join(f"mov.b{max(bits, 16)} %{letter}{first + n}, 0;\n" for n in range(count))
        code += f"bar.sync 0; ld.shared.{form} {operand}, [%r2];\n"
    if space == "local":
        code = f".local .align 16 .b8 room[48];\n{code}"
        code += f"mov.u64 %q20, room; add.u64 %q20, %q20, 16; st.local.{form} [%q20], {operand};\n"
        code += "".join(f"mov.b{max(bits, 16)} %{letter}{first + n}, 0;\n" for n in range(count))
        code += f"ld.local.{form} {operand}, [%q20];\n"
    code += f"st.global.{form} [%q11], {operand};"
    launch = run_ptx(code, data, out, threads=THREADS, blocks=BLOCKS, shared=THREADS * size)
    assert not launch.faults, launch.faults[0]
    assert (out == data).all()


def test_narrow_loads_fill_a_wider_register() -> None:
    """Signed ones by their sign, others by zeros; a narrow store takes the lowest bytes."""
    data, out = random_bytes((THREADS, 8)), np.zeros((5, THREADS), np.uint32)
    code = "mad.wide.u32 %q10, %r0, 8, %q0; mad.wide.u32 %q11, %r0, 4, %q1;\n"
    for n, form in enumerate(("s8", "u8", "s16", "u16", "b8")):
        code += f"ld.global.{form} %r2, [%q10+2]; st.global.b32 [%q11+{n * 4 * THREADS}], %r2;\n"
    code += "mov.b32 %r3, 0x12345678; st.global.b16 [%q10], %r3; st.global.u8 [%q10+3], %r3;"
    want = [data[:, 2].view(np.int8), data[:, 2], data[:, 2:4].copy().view(np.int16)[:, 0]]
    want += [data[:, 2:4].copy().view(np.uint16)[:, 0], data[:, 2]]
    after = data.copy()
    after[:, 0], after[:, 1], after[:, 3] = 0x78, 0x56, 0x78
    run_ptx(code, data, out, threads=THREADS)
    for n, values in enumerate(want):
        assert (out[n] == values.astype(np.int64) % 2**32).all(), n
    assert (data == after).all()


def test_guarded_loads_and_stores() -> None:
    data, out = np.arange(THREADS, dtype=np.uint32), np.full((2, THREADS), 5, np.uint32)
    code = """
    mad.wide.u32 %q10, %r0, 4, %q0;
    mad.wide.u32 %q11, %r0, 4, %q1;
    setp.lt.u32 %p1, %r0, 20;
    mov.u32 %r2, 77;
    @%p1 ld.global.b32 %r2, [%q10];
    st.global.b32 [%q11], %r2;
    @!%p1 st.global.b32 [%q11+256], %r0;
    """
    run_ptx(code, data, out, threads=THREADS)
    thread = np.arange(THREADS)
    assert (out[0] == np.where(thread < 20, thread, 77)).all() and (out[1] == np.where(thread < 20, 5, thread)).all()


def test_qualifiers_that_change_nothing() -> None:
    data, out = np.arange(4 * THREADS, dtype=np.uint32), np.zeros(4 * THREADS, np.uint32)
    loads = ("ld.global.nc.b32", "ld.volatile.global.b32", "ld.relaxed.gpu.global.b32", "ld.acquire.sys.global.b32")
    loads += ("ld.global.ca.b32", "ld.global.cg.b32", "ld.global.L1::evict_last.b32", "ld.weak.global.b32")
    loads += ("ld.global.L1::no_allocate.L2::128B.b32", "ld.global.cs.b32", "ld.global.cv.b32", "ldu.global.b32")
    stores = ("st.global.b32", "st.volatile.global.b32", "st.relaxed.gpu.global.b32", "st.release.gpu.global.b32")
    stores += ("st.global.wb.b32", "st.global.cs.b32", "st.global.wt.b32", "st.global.L1::evict_first.b32")
    for n, load in enumerate(loads):
        code = f"mad.wide.u32 %q10, %r0, 4, %q0; mad.wide.u32 %q11, %r0, 4, %q1; {load} %r2, [%q10];"
        run_ptx(f"{code} {stores[n % len(stores)]} [%q11], %r2;", data, out, threads=4 * THREADS)
        assert (out == data).all(), load
        out[:] = 0


# ---- atomics


def number(kind: str, bits: int) -> int:
    width = int(kind[1:])
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add": lambda x, y: x + y,
    "min": min,
    "max": max,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "exch": lambda x, y: y,
    "inc": lambda x, y: 0 if x >= y else x + 1,
    "dec": lambda x, y: y if x == 0 or x > y else x - 1,
}
FORMS = [f"{name}.{kind}" for name in ("min", "max") for kind in ("u32", "s32", "u64", "s64")]
FORMS += ["add.u32", "add.s32", "add.u64", "and.b32", "or.b32", "xor.b32", "and.b64", "or.b64", "xor.b64"]
FORMS += ["exch.b32", "exch.b64", "inc.u32", "dec.u32"]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("form", FORMS)
def test_atomics_of_integers(form: str, space: str) -> None:
    """Each pair of threads shares an element: one of the two orders must have happened."""
    name, kind = form.split(".")
    width = int(kind[1:])
    dtype = {32: np.uint32, 64: np.uint64}[width]
    rng = np.random.default_rng(0)
    small = (
        rng.integers(0, 5, 3 * THREADS // 2) if name in ("inc", "dec") else rng.integers(0, 2**63, 3 * THREADS // 2) * 2
    )
    memory, values = small[: THREADS // 2].astype(dtype), small[THREADS // 2 :].astype(dtype)
    before, old = memory.copy(), np.zeros(THREADS, dtype)
    r, size = {32: "r", 64: "q"}[width], width // 8
    code = f"""
    shr.u32 %r1, %r0, 1;
    mad.wide.u32 %q10, %r1, {size}, %q0;
    mad.wide.u32 %q11, %r0, {size}, %q1;
    mad.wide.u32 %q12, %r0, {size}, %q2;
    ld.global.b{width} %{r}15, [%q11];
    """
    if space == "global":
        code += f"atom.global.{form} %{r}16, [%q10], %{r}15;\n"
    else:
        code += f"""
        mul.lo.u32 %r2, %r1, {size};
        and.b32 %r3, %r0, 1;
        setp.eq.u32 %p1, %r3, 0;
        @%p1 ld.global.b{width} %{r}17, [%q10];
        @%p1 st.shared.b{width} [%r2], %{r}17;
        bar.sync 0;
        atom.shared.{form} %{r}16, [%r2], %{r}15;
        bar.sync 0;
        @%p1 ld.shared.b{width} %{r}17, [%r2];
        @%p1 st.global.b{width} [%q10], %{r}17;
        """
    code += f"st.global.b{width} [%q12], %{r}16;"
    launch = run_ptx(code, memory, values, old, threads=THREADS, shared=size * THREADS)
    assert not launch.faults, launch.faults[0]
    for n, start in enumerate(before.tolist()):
        ways = []
        for first, second in ((0, 1), (1, 0)):
            seen, held = {}, start
            for who in (first, second):
                seen[who] = held
                held = INTEGERS[name](number(kind, held), number(kind, int(values[2 * n + who]))) % 2**width
            ways.append((seen[0], seen[1], held))
        assert (int(old[2 * n]), int(old[2 * n + 1]), int(memory[n])) in ways, n


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "f16x2", "bf16", "bf16x2"])
def test_atomic_sums_of_floats(kind: str, space: str) -> None:
    lane = kind.removesuffix("x2")
    form = FORMATS[lane]
    a, b = samples(lane, 2, 32)
    a, b = a[: len(a) // 64 * 64].copy(), b[: len(b) // 64 * 64].copy()
    before, count, size = (
        a.copy(),
        len(a) // (2 if kind.endswith("x2") else 1),
        form.bits // 8 * (1 + kind.endswith("x2")),
    )
    old = np.zeros_like(a)
    r = {2: "h", 4: "r", 8: "q"}[size]
    flush = ".noftz" if size == 2 or kind.endswith("x2") else ""
    code = "".join(f"mad.wide.u32 %q{10 + n}, %r0, {size}, %q{n};\n" for n in range(3))
    code += f"ld.global.b{8 * size} %{r}15, [%q11];\n"
    if space == "global":
        code += f"atom.global.add{flush}.{kind} %{r}16, [%q10], %{r}15;\n"
    else:
        code += (
            f"ld.global.b{8 * size} %{r}17, [%q10]; mul.lo.u32 %r2, %r0, {size}; st.shared.b{8 * size} [%r2], %{r}17;\n"
        )
        code += (
            f"atom.shared.add{flush}.{kind} %{r}16, [%r2], %{r}15; bar.sync 0; ld.shared.b{8 * size} %{r}17, [%r2];\n"
        )
        code += f"st.global.b{8 * size} [%q10], %{r}17;\n"
    code += f"st.global.b{8 * size} [%q12], %{r}16;"
    launch = run_ptx(code, a, b, old, threads=count, shared=size * count)
    assert not launch.faults, launch.faults[0]
    assert (old == before).all()
    for x, y, bits in zip(before.tolist(), b.tolist(), a.tolist()):
        want = form.encode(plus(form.decode(x), form.decode(y)))
        nan = want == form.nan and bits & form.nan > form.infinity
        assert bits == want or nan, (hex(x), hex(y), hex(bits), hex(want))


def test_reductions_to_one_element() -> None:
    memory = np.zeros(6, np.uint32)
    code = (
        INDEX
        + """
    red.global.add.u32 [%q0], %r1;
    red.relaxed.gpu.global.max.u32 [%q0+4], %r1;
    red.global.gpu.or.b32 [%q0+8], %r1;
    mov.f32 %r2, 0f3F800000;
    red.global.add.f32 [%q0+12], %r2;
    setp.lt.u32 %p1, %r1, 10;
    @%p1 red.global.add.u32 [%q0+16], 1;
    atom.add.release.gpu.global.u32 %r3, [%q0+20], 2;
    """
    )
    run_ptx(code, memory, threads=THREADS, blocks=BLOCKS)
    count = THREADS * BLOCKS
    want = [count * (count - 1) // 2, count - 1, count - 1, int(np.float32(count).view(np.uint32)), 10, 2 * count]
    assert memory.tolist() == want


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_compare_and_swap(bits: int) -> None:
    dtype, r = {16: (np.uint16, "h"), 32: (np.uint32, "r"), 64: (np.uint64, "q")}[bits]
    memory, old = np.arange(THREADS).astype(dtype) % dtype(4), np.zeros(THREADS, dtype)
    code = f"""
    mad.wide.u32 %q10, %r0, {bits // 8}, %q0;
    mad.wide.u32 %q11, %r0, {bits // 8}, %q1;
    mov.b{bits} %{r}15, 2;
    mov.b{bits} %{r}16, 99;
    atom.global.cas.b{bits} %{r}17, [%q10], %{r}15, %{r}16;
    st.global.b{bits} [%q11], %{r}17;
    """
    run_ptx(code, memory, old, threads=THREADS)
    start = np.arange(THREADS) % 4
    assert (old == start).all() and (memory == np.where(start == 2, 99, start)).all()


def test_a_lock_of_compare_and_swap() -> None:
    """Each thread that asks adds its number: only one holds the lock at a time."""
    memory = np.zeros(2, np.uint32)
    code = (
        INDEX
        + """
    setp.ne.u32 %p3, %r0, 0;
    @%p3 bra DONE;
AGAIN:
    atom.global.acquire.gpu.cas.b32 %r2, [%q0], 0, 1;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra AGAIN;
    ld.relaxed.gpu.global.u32 %r3, [%q0+4];
    add.u32 %r3, %r3, 5;
    st.relaxed.gpu.global.u32 [%q0+4], %r3;
    atom.global.release.gpu.exch.b32 %r2, [%q0], 0;
DONE:
    """
    )
    launch = run_ptx(code, memory, threads=32, blocks=3)
    assert memory.tolist() == [0, 15] and not launch.faults


# ---- copies


@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies(size: int) -> None:
    """Bytes beyond the size of the source are zeros; a group is there after the wait for it."""
    data, out = random_bytes((BLOCKS * THREADS, size)), np.zeros((3, BLOCKS * THREADS, size), np.uint8)
    words = size // 4
    operand = "{ " + ", ".join(f"%r{20 + n}" for n in range(words)) + " }" if words > 1 else "%r20"
    form = f"v{words}.b32" if words > 1 else "b32"
    cache = "cg" if size == 16 else "ca"
    code = (
        INDEX
        + f"""
    mad.wide.u32 %q10, %r1, {size}, %q0;
    mad.wide.u32 %q11, %r1, {size}, %q1;
    mul.lo.u32 %r2, %r0, {size};
    and.b32 %r3, %r0, 3;
    mul.lo.u32 %r3, %r3, {size // 4};
    cp.async.{cache}.shared.global [%r2], [%q10], {size};
    cp.async.commit_group;
    cp.async.ca.shared.global [%r2+{size * THREADS}], [%q10], {size}, %r3;
    cp.async.commit_group;
    cp.async.{cache}.shared::cta.global.L2::128B [%r2+{2 * size * THREADS}], [%q10], {size}, {size};
    cp.async.wait_group 1;
    ld.shared.{form} {operand}, [%r2];
    st.global.{form} [%q11], {operand};
    cp.async.wait_all;
    ld.shared.{form} {operand}, [%r2+{size * THREADS}];
    st.global.{form} [%q11+{out[0].size}], {operand};
    ld.shared.{form} {operand}, [%r2+{2 * size * THREADS}];
    st.global.{form} [%q11+{2 * out[0].size}], {operand};
    """
    )
    if size < 16:
        code = code.replace("cp.async.cg", "cp.async.ca")
    else:
        code = code.replace("cp.async.ca.shared.global [%r2+", "cp.async.cg.shared.global [%r2+")
    launch = run_ptx(code, data, out, threads=THREADS, blocks=BLOCKS, shared=3 * size * THREADS)
    assert not launch.faults, launch.faults[0]
    kept = (np.arange(BLOCKS * THREADS) % 4) * (size // 4)
    assert (out[0] == data).all() and (out[2] == data).all()
    assert (out[1] == np.where(np.arange(size) < kept[:, None], data, 0)).all()


def test_addresses_with_offsets_and_symbols() -> None:
    out = np.zeros((2, 32), np.uint32)
    code = """
    mov.u32 %r2, global_smem;
    shl.b32 %r3, %r0, 2;
    add.u32 %r2, %r2, %r3;
    st.shared.u32 [%r2+128], %r0;
    mad.wide.u32 %q10, %r0, 4, %q0;
    bar.warp.sync 0xffffffff;
    ld.shared.u32 %r4, [%r2+128];
    st.global.u32 [%q10], %r4;
    add.u64 %q10, %q10, 256;
    st.global.u32 [%q10+-128], %r3;
    """
    run_ptx(code, out, shared=256)
    assert (out == [np.arange(32), 4 * np.arange(32)]).all()


def test_variables_with_values() -> None:
    values = np.arange(1, 33, dtype=np.uint32) * np.uint32(0x01030507)
    out = np.zeros(32, np.uint32)
    listed = ", ".join(map(str, values.view(np.uint8)))
    declarations = f".global .align 4 .b8 table[128] = {{{listed}}};\n.global .align 8 .b64 pair[2] = {{5, 6}};"
    code = """
    mov.u64 %q10, table;
    mad.wide.u32 %q10, %r0, 4, %q10;
    ld.global.nc.b32 %r1, [%q10];
    mov.u64 %q11, pair;
    ld.global.b64 %q12, [%q11+8];
    cvt.u32.u64 %r2, %q12;
    add.u32 %r1, %r1, %r2;
    mad.wide.u32 %q13, %r0, 4, %q0;
    st.global.b32 [%q13], %r1;
    """
    launch = run_ptx(code, out, declarations=declarations)
    assert not launch.faults and (out == values + np.uint32(6)).all()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16x2"])
def test_vectors_of_atomic_sums(kind: str) -> None:
    """Each element of a vector is added to one of its own."""
    dtype = {"f32": np.float32, "f16": np.float16, "bf16x2": np.uint32}[kind]
    values = np.arange(4 * THREADS).reshape(THREADS, 4)
    memory = np.ones((THREADS, 4), dtype) if kind != "bf16x2" else np.full((THREADS, 4), 0x3F803F80, np.uint32)
    added = values.astype(dtype) if kind != "bf16x2" else np.full((THREADS, 4), 0x3F804000, np.uint32)
    size, r = (16, "r") if kind != "f16" else (8, "h")
    names = ", ".join(f"%{r}{10 + n}" for n in range(4))
    code = f"mad.wide.u32 %q10, %r0, {size}, %q0; mad.wide.u32 %q11, %r0, {size}, %q1;\n"
    code += f"ld.global.v4.b{2 * size} {{{names}}}, [%q11];\n"
    flush = "" if kind == "f32" else ".noftz"
    code += f"red.global.gpu.relaxed.add{flush}.v4.{kind} [%q10], {{{names}}};"
    launch = run_ptx(code, memory, added, threads=THREADS)
    want = (values + 1).astype(dtype) if kind != "bf16x2" else np.full((THREADS, 4), 0x40004040, np.uint32)
    assert not launch.faults and (memory == want).all()


def test_hints_are_no_errors() -> None:
    a = np.arange(32, dtype=np.uint32)
    code = "prefetch.global.L2 [%q0]; membar.gl; fence.acq_rel.gpu; fence.sc.cta; nanosleep.u32 20; mov.b32 {d}, {a};"
    code += "createpolicy.fractional.L2::evict_first.b64 %q25, 1.0;"
    assert (compute(code, np.uint32, a, threads=32) == a).all()
