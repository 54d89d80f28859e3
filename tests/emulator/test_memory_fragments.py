"""Products of tensor cores against the definition of their fragments, an element at a time."""

import numpy as np
import pytest
import torch
from emulated_blocks import Blocks

from bench.emulator.arithmetic.fragments import multiply
from bench.emulator.program.instructions.tensor_core import WarpGroupProduct

BLOCKS, WARPS = 2, 2
SHAPE = (BLOCKS, WARPS)
TORCH = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "s8": torch.int8,
    "u8": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def random_elements(rng: np.random.Generator, kind: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of a kind as float64, and their bits."""
    if kind in ("s8", "u8"):
        x = torch.from_numpy(rng.integers(-128 if kind == "s8" else 0, 127, shape)).to(TORCH[kind])
    else:
        x = torch.from_numpy(rng.integers(-8, 9, shape) / 4).to(TORCH[kind])  # sums are exact
    bits = x.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[x.element_size()]).numpy()
    return x.double().numpy(), bits


def pack(bits: np.ndarray, element_of: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Registers [blocks, threads] of a matrix [blocks, warps, rows, columns]; element_of: of each register the rows and
    columns [32, elements of a register].
    """
    registers = []
    for rows, columns in element_of:
        held = np.ascontiguousarray(bits[:, :, rows, columns])  # [blocks, warps, 32, elements]
        registers.append(held.view(np.uint32).reshape(bits.shape[0], -1))
    return registers


LANE = np.arange(32)
G, QUAD = LANE // 4, LANE % 4  # groupID and threadID_in_group of the manual


def a_elements(k: int, each: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fragment A of m16n8k: a register is row g or g + 8, and `each` columns from each * t, in either half of k."""
    registers = []
    for half in range(max(1, k // (4 * each))):
        for row in (0, 8):
            columns = QUAD[:, None] * each + np.arange(each) + half * 4 * each
            registers.append((np.broadcast_to(G[:, None] + row, columns.shape), columns))
    return registers


def b_elements(k: int, each: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fragment B: rows from each * t in either half of k, column g."""
    registers = []
    for half in range(max(1, k // (4 * each))):
        rows = QUAD[:, None] * each + np.arange(each) + half * 4 * each
        registers.append((rows, np.broadcast_to(G[:, None], rows.shape)))
    return registers


def unpack(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Accumulators [blocks, warps, 16, 8]: c0, c1 are row g, columns 2 t and 2 t + 1; c2, c3 row g + 8."""
    if kind == "f16":
        halves = [r.view(np.float16).reshape(*r.shape, 2)[..., n] for r in registers for n in (0, 1)]
        registers = [x.astype(np.float32).view(np.uint32) for x in halves]
        kind = "f32"
    out = np.empty((BLOCKS, WARPS, 16, 8))
    for n, register in enumerate(registers):
        numbers = register.view(np.float32 if kind == "f32" else np.int32).reshape(BLOCKS, WARPS, 32)
        out[:, :, G + 8 * (n // 2), 2 * QUAD + n % 2] = numbers
    return out


def accumulators(rng: np.random.Generator, kind: str) -> list[np.ndarray]:
    if kind == "f16":
        halves = (rng.integers(-9, 9, (2, BLOCKS, WARPS * 32, 2)) / 4).astype(np.float16)
        return [x.view(np.uint32)[..., 0] for x in halves]
    numbers = rng.integers(-9, 9, (4, BLOCKS, WARPS * 32))
    return list(numbers.astype(np.float32 if kind == "f32" else np.int32).view(np.uint32))


@pytest.mark.parametrize(
    "d, a, b, k",
    [
        *[("f32", kind, kind, k) for kind in ("f16", "bf16") for k in (8, 16)],
        ("f16", "f16", "f16", 16),
        ("f32", "tf32", "tf32", 4),
        ("f32", "tf32", "tf32", 8),
        *[("s32", a, b, k) for a, b in (("s8", "s8"), ("u8", "s8")) for k in (16, 32)],
        ("f32", "e4m3", "e5m2", 32),
    ],
)
@pytest.mark.parametrize("rows, columns, steps", [(1, 1, 1), (2, 3, 2)])
def test_mma(d: str, a: str, b: str, k: int, rows: int, columns: int, steps: int) -> None:
    rng = np.random.default_rng(k)
    each = 4 // TORCH[a].itemsize
    left = [[random_elements(rng, a, BLOCKS, WARPS, 16, k) for _ in range(rows)] for _ in range(steps)]
    right = [[random_elements(rng, b, BLOCKS, WARPS, k, 8) for _ in range(columns)] for _ in range(steps)]
    present = [(i, j) for i in range(rows) for j in range(columns) if (i, j) != (1, 1)][::-1]
    c = [accumulators(rng, d) for _ in present]
    modifiers = ("sync", "aligned", f"m16n8k{k}", "row", "col", d, a, b, d)
    out = multiply(
        modifiers,
        SHAPE,
        (rows, columns, steps, present),
        [[pack(bits, a_elements(k, each)) for _, bits in step] for step in left],
        [[pack(bits, b_elements(k, each)) for _, bits in step] for step in right],
        c,
    )
    size = 2 if d == "f16" else 4
    assert len(out) == size * len(present)
    for n, (i, j) in enumerate(present):
        expected = unpack(c[n], d)
        for step in range(steps):
            expected = expected + left[step][i][0] @ right[step][j][0]
        assert (unpack(out[size * n : size * n + size], d) == expected).all()


def test_sums_of_integers_wrap_or_stop_at_their_limits() -> None:
    ones, largest = np.full((1, 32), 0x01010101, np.uint32), np.full((1, 32), 2**31 - 5, np.uint32)
    for saturate, expected in (((), -(2**31) + 27), (("satfinite",), 2**31 - 1)):
        modifiers = ("sync", "aligned", "m16n8k32", "row", "col", *saturate, "s32", "s8", "s8", "s32")
        out = multiply(modifiers, (1, 1), (1, 1, 1, [(0, 0)]), [[[ones] * 4]], [[[ones] * 2]], [[largest] * 4])
        assert all((x.view(np.int32) == expected).all() for x in out)


def test_rounding_of_tf32_and_of_sums() -> None:
    """tf32 takes the upper 19 bits; f16 accumulators are rounded after every step."""
    one = np.full((1, 32), 0x3F801FFF, np.uint32)
    zero = np.zeros((1, 32), np.uint32)
    modifiers = ("sync", "aligned", "m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32")
    out = multiply(modifiers, (1, 1), (1, 1, 1, [(0, 0)]), [[[one] * 4]], [[[one] * 2]], [[zero] * 4])
    assert all((x.view(np.float32) == 8).all() for x in out)
    ones = np.full((1, 32), 0x3C003C00, np.uint32)
    big = np.full((1, 32), 0x68006800, np.uint32)  # 2048, to which 1 is half a unit in the last place
    first = np.where(np.arange(32)[None] % 4 == 0, np.uint32(0x3C00), np.uint32(0))  # one element of each row
    modifiers = ("sync", "aligned", "m16n8k16", "row", "col", "f16", "f16", "f16", "f16")
    a = [[[first, first, zero, zero]]] * 2
    out = multiply(modifiers, (1, 1), (1, 1, 2, [(0, 0)]), a, [[[ones] * 2]] * 2, [[big] * 2])
    assert all((x == big).all() for x in out)


def test_sums_do_not_depend_on_their_place_nor_on_what_runs_together() -> None:
    """Numbers that round, in one run of several products and in a run for each."""
    rng = np.random.default_rng(3)
    modifiers = ("sync", "aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32")
    rows, columns, steps = 2, 3, 4

    def registers(count: int) -> list[np.ndarray]:
        halves = rng.standard_normal((count, BLOCKS, WARPS * 32, 2)).astype(np.float16)
        return list(halves.view(np.uint32)[..., 0])

    a = [[registers(4) for _ in range(rows)] for _ in range(steps)]
    b = [[registers(2) for _ in range(columns)] for _ in range(steps)]
    present = [(i, j) for i in range(rows) for j in range(columns)]
    c = [list(rng.standard_normal((4, BLOCKS, WARPS * 32)).astype(np.float32).view(np.uint32)) for _ in present]
    together = multiply(modifiers, SHAPE, (rows, columns, steps, present), a, b, c)
    for n, (i, j) in enumerate(present):
        alone = c[n]
        for step in range(steps):
            alone = multiply(modifiers, SHAPE, (1, 1, 1, [(0, 0)]), [[a[step][i]]], [[b[step][j]]], [alone])
        assert all((x == y).all() for x, y in zip(together[4 * n : 4 * n + 4], alone))


def swizzled(address: int, width: int) -> int:
    """Bits 4 and up exchanged with those from bit 7: one bit for 32 bytes, two for 64, three for 128."""
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[width]
    return address ^ ((address >> 7) % (1 << bits)) << 4


def place(width: int, transposed: bool, r: int, c: int, element: int, lead: int, stride: int) -> int:
    """The byte of row r (of m or n), column c (of k), in the canonical layouts of the manual, before swizzling.

    The unit is 16 bytes: T elements. With k contiguous a group of 8 rows is 8 lines of the swizzle's width, and lies
    `stride` from the next; without swizzle the two columns of units lie `lead` apart. With m or n contiguous 8 lines of
    k lie `stride` from the next, and lines `lead`; without swizzle it is the other way round.
    """
    t = 16 // element
    if not transposed:
        unit, inner = divmod(c, t)
        if width == 0:
            return (r // 8) * stride + (r % 8) * 16 + unit * lead + inner * element
        return (r // 8) * stride + (r % 8) * width + unit * 16 + inner * element
    if width == 0:
        return (r // 8) * stride + (c // 8) * lead + (c % 8) * 16 + (r % 8) * element
    across, inner = divmod(r, width // element)
    return across * lead + (c // 8) * stride + (c % 8) * width + inner * element


def write_matrix(
    memory: np.ndarray, start: int, bits: np.ndarray, width: int, transposed: bool, lead: int, stride: int
) -> np.ndarray:
    """Lay a matrix [blocks, rows, columns] out in shared memory [blocks, bytes]; its descriptor."""
    element = bits.itemsize
    for r, c in np.ndindex(bits.shape[1:]):
        at = swizzled(start + place(width, transposed, r, c, element, lead, stride), width)
        memory[:, at : at + element] = np.ascontiguousarray(bits[:, r, c])[:, None].view(np.uint8)
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return np.array([[start >> 4 | lead >> 4 << 16 | stride >> 4 << 32 | mode << 62]], np.uint64)


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize(
    "d, kind, n, transposed",
    [
        ("f32", "bf16", 16, (False, False)),
        ("f32", "f16", 64, (True, True)),
        ("f32", "bf16", 8, (False, True)),
        ("f16", "f16", 8, (True, False)),
        ("f32", "tf32", 8, (False, False)),
        ("s32", "s8", 24, (False, False)),
        ("f32", "e4m3", 8, (False, False)),
    ],
)
@pytest.mark.parametrize("left", ["shared", "registers"])
def test_wgmma(width: int, d: str, kind: str, n: int, transposed: tuple[bool, bool], left: str) -> None:
    rng = np.random.default_rng(width)
    element = TORCH[kind].itemsize
    k = 32 // element
    m = Blocks([f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{kind}.{kind}"], BLOCKS, 128, shared=65536)
    m.checks = False
    m.shared_memory.history = None
    memory = m.shared_memory.bytes
    lead, stride = (2048, 1024) if width else (128, 256)
    (a, a_bits), (b, b_bits) = (random_elements(rng, kind, BLOCKS, rows, k) for rows in (64, n))
    b_descriptor = write_matrix(memory, 32768, b_bits, width, transposed[1], lead, stride)
    if left == "registers":
        tiles = a_bits.reshape(BLOCKS, 4, 16, k)  # a warp has 16 rows
        a_operand: np.ndarray | list = pack(tiles, a_elements(k, 4 // element))
    else:
        a_operand = write_matrix(memory, 0, a_bits, width, transposed[0], lead, stride)
    plan = WarpGroupProduct(64, n, k, d, kind, kind, False, False, transposed[0] and left == "shared", transposed[1])
    product = np.einsum("xmk,xnk->xmn", a, b)
    count = n // 4 if d == "f16" else n // 2
    zero = [np.zeros((1, 1), np.uint32)] * count
    out = m.wgmma_shared(0, plan, zero, a_operand, b_descriptor, np.ones((1, 1), bool))
    assert (accumulated(out, d, n) == product).all()
    twice = m.wgmma_shared(0, plan, out, a_operand, b_descriptor, np.ones((1, 1), bool))
    assert (accumulated(twice, d, n) == 2 * product).all()
    fresh = m.wgmma_shared(0, plan, out, a_operand, b_descriptor, np.array([[False], [True]]))
    assert (accumulated(fresh, d, n) == product * np.array([1, 2])[:, None, None]).all()
    if d != "s32":
        negated = m.wgmma_shared(0, plan._replace(negate_a=True), out, a_operand, b_descriptor, np.ones((1, 1), bool))
        assert (accumulated(negated, d, n) == 0).all()
    assert m.counts[0, "mma"] == (3 if d == "s32" else 4) * BLOCKS


def accumulated(registers: list[np.ndarray], kind: str, n: int) -> np.ndarray:
    """[blocks, 64, n]: register 4 j + 2 h + e is row 16 w + g + 8 h, column 8 j + 2 t + e, of warp w."""
    if kind == "f16":
        registers = [
            r.view(np.float16).reshape(*r.shape, 2)[..., e].astype(np.float32) for r in registers for e in (0, 1)
        ]
    out = np.empty((BLOCKS, 64, n))
    thread = np.arange(128)
    for index, register in enumerate(registers):
        numbers = register if kind == "f16" else register.view(np.float32 if kind == "f32" else np.int32)
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (index % 4 // 2)
        column = 8 * (index // 4) + 2 * (thread % 4) + index % 2
        out[:, row, column] = numbers
    return out
