"""Products of tensor cores from the registers of a warp, or from shared memory for a warp group.

A register of an operand holds 32 bits: one tf32, two f16 or bf16, four s8, u8 or f8. A thread is lane 4 g + t of its
warp: register r of A has row g + 8 (r mod 2), register r of B column g, columns and rows of k from t; C has row
g + 8 (r / 2), columns 2 t and 2 t + 1. Layouts: "Matrix Fragments" in the PTX manual's chapters on mma and wgmma.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
F8 = {"e4m3": (4, 3), "e5m2": (5, 2)}
ELEMENTS = {"tf32": 1, "f16": 2, "bf16": 2, "s8": 4, "u8": 4, "e4m3": 4, "e5m2": 4}  # of a register
RAW = {1: np.uint32, 2: np.uint16, 4: np.uint8}


def f8_values(kind: str) -> Array:
    """The 256 numbers of a kind of 8 bits, as float32."""
    exponent_bits, mantissa_bits = F8[kind]
    bits = np.arange(256)
    exponent, mantissa = bits >> mantissa_bits & (1 << exponent_bits) - 1, bits & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    value = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    if kind == "e5m2":
        value = np.where(exponent == 31, np.where(mantissa > 0, np.nan, np.inf), value)
    else:
        value = np.where(bits & 127 == 127, np.nan, value)
    return np.where(bits & 128, -value, value).astype(np.float32)


F8_VALUES = {kind: f8_values(kind) for kind in F8}


def numbers_of(raw: Array, kind: str) -> Array:
    """Elements of an operand, unsigned bits, as float32; 8-bit integers as float64, in which their sums are exact."""
    if kind == "bf16":
        return np.left_shift(raw, 16, dtype=np.uint32).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)
    if kind in ("s8", "u8"):
        return (raw.view(np.int8) if kind == "s8" else raw).astype(np.float64)
    return F8_VALUES[kind][raw]


def stack_registers(registers: list[Array], kind: str, shape: tuple[int, int]) -> Array:
    """Registers [blocks, threads] as raw elements [registers, blocks * warps, 8, 4, elements of a register]."""
    stacked = np.empty((len(registers), shape[0], shape[1] * 32), np.uint32)
    for n, register in enumerate(registers):
        stacked[n] = register
    return stacked.view(RAW[ELEMENTS[kind]]).reshape(len(registers), shape[0] * shape[1], 8, 4, ELEMENTS[kind])


def multiply(modifiers: Sequence[str], shape: tuple[int, int], plan: tuple, a: list, b: list, c: list) -> list[Array]:
    """A run of mma.sync as products of larger matrices, one for each step along k, each rounded once.

    modifiers   of the instruction: sync, aligned, m16n8k16, row, col, and the kinds of d, a, b and c
    shape       (blocks, warps)
    plan        (rows, columns, steps, present): tiles of the product, steps along k, and which (row, column) there are
    a, b        [steps][rows or columns][registers]
    c           [len(present)][registers]
    Returns the registers of d, in the order of `present`.
    """
    d_kind, a_kind, b_kind, c_kind = modifiers[-4:]
    rows, columns, steps, present = plan
    blocks, warps = shape
    held_a, held_b = len(a[0][0]), len(b[0][0])
    x = stack_registers([r for step in a for tile in step for r in tile], a_kind, shape)
    y = stack_registers([r for step in b for tile in step for r in tile], b_kind, shape)
    each = x.shape[-1]
    # A: [steps, rows, k half, row half, warp, g, t, each]
    # -> [steps, warp, (rows, row half, g), (k half, t, element)]
    x = x.reshape(steps, rows, held_a // 2, 2, -1, 8, 4, each).transpose(0, 4, 1, 3, 5, 2, 6, 7)
    x = numbers_of(np.ascontiguousarray(x), a_kind).reshape(steps, blocks * warps, 16 * rows, -1)
    # B: [steps, columns, k half, warp, g, t, element] -> [steps, warp, (k half, t, element), (columns, g)]
    y = y.reshape(steps, columns, held_b, -1, 8, 4, each).transpose(0, 3, 2, 5, 6, 1, 4)
    y = numbers_of(np.ascontiguousarray(y), b_kind).reshape(steps, blocks * warps, -1, 8 * columns)
    # [rows, columns, row half, element, blocks, threads] <-> [warp, (rows, row half, g), (columns, t, element)]
    sums = np.zeros((rows, columns, 4, blocks, warps * 32), NUMBERS[c_kind])
    for (row, column), registers in zip(present, c):
        for n, number in enumerate(accumulators_of(registers, c_kind)):
            sums[row, column, n] = number
    sums = sums.reshape(rows, columns, 2, 2, -1, 8, 4).transpose(4, 0, 2, 5, 1, 6, 3)
    sums = sums.reshape(blocks * warps, 16 * rows, 8 * columns)
    for left, right in zip(x, y):
        sums = rounded_sum(sums, left, right, d_kind, "satfinite" in modifiers)
    sums = sums.reshape(-1, rows, 2, 8, columns, 4, 2).transpose(1, 4, 2, 6, 0, 3, 5)
    sums = np.ascontiguousarray(sums).reshape(rows, columns, 4, blocks, warps * 32)
    return [register for place in present for register in registers_of(list(sums[place]), d_kind)]


def rounded_sum(sums: Array, left: Array, right: Array, kind: str, saturate: bool = False) -> Array:
    """sums + left @ right, of which only the result is rounded: so it does not matter in which order numbers are added,
    nor where in the matrices they lie. (Tensor cores round too, more coarsely, in ways that are not documented.)

    saturate: integers stop at their limits, instead of wrapping.
    """
    total = np.matmul(left.astype(np.float64, copy=False), right.astype(np.float64, copy=False))
    if kind == "s32" and saturate:
        limits = np.iinfo(np.int32)
        return np.clip(sums.view(np.int32) + total, limits.min, limits.max).astype(np.int32).view(np.uint32)
    if kind == "s32":
        return sums + total.astype(np.int64).astype(np.uint32)
    total += sums
    return total.astype(NUMBERS[kind])


NUMBERS = {"f32": np.float32, "f16": np.float16, "s32": np.uint32}  # of accumulators


def accumulators_of(registers: list[Array], kind: str) -> list[Array]:
    """Registers as numbers of accumulators, two f16 of each."""
    if kind != "f16":
        return [x.view(NUMBERS[kind]) for x in registers]
    return [(x >> np.uint32(16 * half)).astype(np.uint16).view(np.float16) for x in registers for half in (0, 1)]


def registers_of(numbers: list[Array], kind: str) -> list[Array]:
    """Numbers of accumulators as registers, two f16 in each."""
    if kind != "f16":
        return [x.view(np.uint32) for x in numbers]
    halves = [x.view(np.uint16).astype(np.uint32) for x in numbers]
    return [low | high << np.uint32(16) for low, high in zip(halves[::2], halves[1::2])]


def multiply_warp_group(
    plan: Any, shape: tuple[int, int], old: list[Array], a: Array | list[Array], b: Array, scale: Array
) -> list[Array]:
    """wgmma of each warp group: d = a b (+ d, where scale is true).

    plan    m, n, k, d_kind, a_kind, b_kind, negate_a, negate_b
    shape   (blocks, threads)
    old     the registers of d
    a       raw elements [blocks, warp groups, 64, k], or four registers
    b       raw elements [blocks, warp groups, n, k]
    """
    blocks, threads = shape
    groups, n = threads // 128, plan.n
    if isinstance(a, list):
        x = stack_registers(a, plan.a_kind, (blocks, threads // 32))
        # [k half, row half, block, group, warp, g, t, each]
        # -> [block, group, (warp, row half, g), (k half, t, each)]
        x = x.reshape(2, 2, blocks, groups, 4, 8, 4, -1).transpose(2, 3, 4, 1, 5, 0, 6, 7)
        a = np.ascontiguousarray(x).reshape(blocks, groups, 64, -1)
    left, right = numbers_of(a, plan.a_kind), numbers_of(b, plan.b_kind)
    if plan.negate_a != plan.negate_b:
        left = -left
    kept = accumulators_of(old, plan.d_kind)
    if not scale.all():
        kept = [np.where(scale, number, number.dtype.type(0)) for number in kept]
    sums = np.empty((n // 2, blocks, threads), NUMBERS[plan.d_kind])
    for i, number in enumerate(kept):
        sums[i] = number
    # [column of 8, row half, element, blocks, threads]
    # <-> [block, group, (warp, row half, g), (column of 8, t, element)]
    sums = sums.reshape(n // 8, 2, 2, blocks, groups, 4, 8, 4).transpose(3, 4, 5, 1, 6, 0, 7, 2)
    sums = rounded_sum(sums.reshape(blocks, groups, 64, n), left, right.swapaxes(2, 3), plan.d_kind)
    sums = sums.reshape(blocks, groups, 4, 2, 8, n // 8, 4, 2).transpose(5, 3, 7, 0, 1, 2, 4, 6)
    return registers_of(list(np.ascontiguousarray(sums).reshape(n // 2, blocks, threads)), plan.d_kind)
