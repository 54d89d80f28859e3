"""Arithmetic of integers. What numpy lacks is in `bench.emulator.integers`."""

from ..kinds import Kind, kind_of
from ..ptx import Instruction, UnknownPTX
from ..writer import Writer
from .carries import emit_carry
from .floating import emit_floating
from .table import emits, kind_at_end

SYMBOLS = {"add": "+", "sub": "-", "mul": "*"}


def check_modifiers(i: Instruction, *known: str) -> None:
    """An error for a modifier, besides the type, that is none of these."""
    if unknown := [m for m in i.modifiers[:-1] if m not in known]:
        raise UnknownPTX(f".{unknown[0]}")


@emits("add", "sub", "mul", "min", "max", "neg", "abs", "mad", "div", "rem")
def emit_arithmetic(w: Writer, i: Instruction) -> None:
    """Opcodes that integers and floating-point numbers share."""
    kind = kind_at_end(i)
    if kind.is_float:
        emit_floating(w, i)
    elif "cc" in i.modifiers:
        emit_carry(w, i)
    elif kind.lanes > 1:
        emit_packed(w, i, kind)
    else:
        INTEGER[i.opcode](w, i, kind)


def emit_packed(w: Writer, i: Instruction, kind: Kind) -> None:
    """Two integers of 16 bits in a register."""
    check_modifiers(i, "relu")
    if i.opcode not in ("add", "sub", "min", "max", "neg", "abs"):
        raise UnknownPTX("packed integers")
    parts = [f"halves({w.value(x, kind)}).view({kind.lane.dtype})" for x in i.operands[1:]]
    if i.opcode in ("min", "max"):
        result = f"np.{i.opcode}imum({', '.join(parts)})"
        result = f"np.maximum({result}, {w.constant(0, kind.lane.dtype)})" if "relu" in i.modifiers else result
    elif i.opcode in SYMBOLS:
        result = f"({parts[0]} {SYMBOLS[i.opcode]} {parts[1]})"
    else:
        result = f"(-{parts[0]})" if i.opcode == "neg" else f"np.abs({parts[0]})"
    w.assign(i.operands[0], f"joined({result}.view(u2))", kind)


def emit_sum(w: Writer, i: Instruction, kind: Kind) -> None:
    """add and sub, and products of the same width, which wrap unless they saturate."""
    check_modifiers(i, "sat", "lo")
    if "sat" in i.modifiers:
        a, b = (w.value(x, kind) for x in i.operands[1:3])
        return w.assign(i.operands[0], f"{i.opcode}_sat({a}, {b})", kind)
    plain = kind_of(f"b{kind.bits}")  # wraps alike, signed or not
    a, b = (w.value(x, plain) for x in i.operands[1:3])
    w.assign(i.operands[0], f"{a} {SYMBOLS[i.opcode]} {b}", plain)


def wide_product(w: Writer, i: Instruction, kind: Kind) -> tuple[str, Kind]:
    """An expression for a product of twice the width, and its type."""
    wide = kind_of(f"{kind.letter}{2 * kind.bits}")
    a, b = (f"{w.value(x, kind)}.astype({wide.dtype})" for x in i.operands[1:3])
    return f"({a} * {b})", wide


def emit_product(w: Writer, i: Instruction, kind: Kind) -> None:
    """mul: the lower or upper half, or all of it."""
    check_modifiers(i, "wide", "hi", "lo")
    if "wide" in i.modifiers:
        product, wide = wide_product(w, i, kind)
        w.assign(i.operands[0], product, wide)
    elif "hi" in i.modifiers:
        a, b = (w.value(x, kind) for x in i.operands[1:3])
        w.assign(i.operands[0], f"mul_hi({a}, {b})", kind)
    else:
        emit_sum(w, i, kind)


def emit_multiply_add(w: Writer, i: Instruction, kind: Kind) -> None:
    """mad: of the lower or upper half of a product, or of all of it."""
    check_modifiers(i, "wide", "hi", "lo", "sat")
    c = i.operands[3]
    if "wide" in i.modifiers:
        product, wide = wide_product(w, i, kind)
        return w.assign(i.operands[0], f"{product} + {w.value(c, wide)}", wide)
    a, b, c = (w.value(x, kind) for x in i.operands[1:4])
    if "sat" in i.modifiers:
        return w.assign(i.operands[0], f"mad_hi_sat({a}, {b}, {c})", kind)
    product = f"mul_hi({a}, {b})" if "hi" in i.modifiers else f"{a} * {b}"
    w.assign(i.operands[0], f"{product} + {c}", kind)


def emit_quotient(w: Writer, i: Instruction, kind: Kind) -> None:
    """div and rem."""
    check_modifiers(i)
    a, b = (w.value(x, kind) for x in i.operands[1:3])
    w.assign(i.operands[0], f"{kind.letter}{i.opcode}({a}, {b})", kind)


def emit_extreme(w: Writer, i: Instruction, kind: Kind) -> None:
    """min and max."""
    check_modifiers(i, "relu")
    a, b = (w.value(x, kind) for x in i.operands[1:3])
    e = f"np.{i.opcode}imum({a}, {b})"
    w.assign(i.operands[0], f"np.maximum({e}, {w.constant(0, kind.dtype)})" if "relu" in i.modifiers else e, kind)


def emit_sign(w: Writer, i: Instruction, kind: Kind) -> None:
    """neg and abs."""
    check_modifiers(i)
    a = w.value(i.operands[1], kind)
    w.assign(i.operands[0], f"-{a}" if i.opcode == "neg" else f"np.abs({a})", kind)


INTEGER = {
    **{"add": emit_sum, "sub": emit_sum, "mul": emit_product, "mad": emit_multiply_add, "div": emit_quotient},
    **{"rem": emit_quotient, "min": emit_extreme, "max": emit_extreme, "neg": emit_sign, "abs": emit_sign},
}


@emits("mul24", "mad24")
def emit_24_bits(w: Writer, i: Instruction) -> None:
    """mul24 and mad24."""
    check_modifiers(i, "lo", "hi")
    kind = kind_at_end(i)
    a, b = (w.value(x, kind) for x in i.operands[1:3])
    product = f"mul24({a}, {b}, {'hi' in i.modifiers})"
    w.assign(i.operands[0], f"{product} + {w.value(i.operands[3], kind)}" if i.opcode == "mad24" else product, kind)


@emits("sad")
def emit_distance(w: Writer, i: Instruction) -> None:
    """sad: the distance of two numbers, added to a third."""
    kind = kind_at_end(i)
    a, b, c = (w.value(x, kind) for x in i.operands[1:4])
    w.assign(i.operands[0], f"sad({a}, {b}, {c})", kind)


@emits("dp4a", "dp2a")
def emit_byte_dot(w: Writer, i: Instruction) -> None:
    """dp4a and dp2a: dot products of bytes, added to a number."""
    kinds = [kind_of(m) for m in i.modifiers if m not in ("lo", "hi")]
    a, b, c = (w.value(x, "b32") for x in i.operands[1:4])
    signed = ", ".join(str(kind.letter == "s") for kind in kinds)
    half = f", {'hi' in i.modifiers}" if i.opcode == "dp2a" else ""
    w.assign(i.operands[0], f"{i.opcode}({a}, {b}, {c}, {signed}{half})", "b32")
