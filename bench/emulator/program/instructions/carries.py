"""Sums of several registers: instructions that leave a carry (`.cc`) or take one, which is a register of its own."""

import numpy as np

from ..kinds import kind_of
from ..ptx import Instruction, Register
from ..writer import Writer
from .table import called_by_code, emits, kind_at_end

CARRY = Register("carry_", 1)


@emits("addc", "subc", "madc")
def emit_carry(w: Writer, i: Instruction) -> None:
    """The forms with `.cc` of add, sub and mad, and addc, subc and madc."""
    kind = kind_at_end(i)
    kind = kind_of(f"u{kind.bits}") if not i.opcode.startswith("mad") else kind
    w.kernel.registers.setdefault(CARRY.name, CARRY.bits)
    carry = w.predicate(CARRY) if i.opcode.endswith("c") else "np.array([[False]])"
    a, b, *c = (w.value(x, kind) for x in i.operands[1:])
    if i.opcode.startswith("mad"):
        a, b = (f"mul_hi({a}, {b})" if "hi" in i.modifiers else f"({a} * {b})"), c[0]
    difference = i.opcode.startswith("sub")
    unsigned = f".view({kind.unsigned})"
    w.line(f"sum_, over_ = with_carry({a}{unsigned}, {b}{unsigned}, {carry}, {difference})")
    w.assign(i.operands[0], "sum_", f"u{kind.bits}")
    if "cc" in i.modifiers:
        w.assign(CARRY, "over_", "pred")


@called_by_code
def with_carry(a: np.ndarray, b: np.ndarray, carry: np.ndarray, difference: bool) -> tuple[np.ndarray, np.ndarray]:
    """a + b + carry or a - b - carry, modulo the width, and whether that left the range."""
    one = carry.astype(a.dtype)
    if difference:
        return a - b - one, (a < b) | ((a == b) & carry)
    total = a + b
    return total + one, (total < a) | ((total + one) < total)
