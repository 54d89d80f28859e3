"""Bits: logic, shifts, fields, permutations, counts. What numpy lacks is in `bench.emulator.integers`."""

from ..kinds import kind_of
from ..ptx import Instruction, UnknownPTX
from ..writer import Writer
from .table import emits, kind_at_end

SYMBOLS = {"and": "&", "or": "|", "xor": "^"}
LOGIC_OF_THREE = {
    0xEA: "({a} & {b}) | {c}",
    0xEC: "({a} & {c}) | {b}",
    0xF8: "{a} | ({b} & {c})",
    0xC0: "{a} & {b}",
    0x80: "{a} & {b} & {c}",
    0xFC: "{a} | {b}",
    0xFE: "{a} | {b} | {c}",
    0x3C: "{a} ^ {b}",
    0x96: "{a} ^ {b} ^ {c}",
    0x6A: "({a} & {b}) ^ {c}",
    0x78: "{a} ^ ({b} & {c})",
    0xCA: "({a} & {b}) | (~{a} & {c})",
    0xE2: "({b} & {a}) | (~{b} & {c})",
    0xE8: "({a} & {b}) | ({c} & ({a} | {b}))",
}


@emits("and", "or", "xor", "not", "cnot")
def emit_logic(w: Writer, i: Instruction) -> None:
    """and, or, xor, not and cnot, of predicates too."""
    kind = kind_at_end(i)
    a = w.value(i.operands[1], kind)
    if i.opcode == "not":
        w.assign(i.operands[0], f"~{a}", kind)
    elif i.opcode == "cnot":
        w.assign(i.operands[0], f"({a} == 0).astype({kind.dtype})", kind)
    else:
        w.assign(i.operands[0], f"{a} {SYMBOLS[i.opcode]} {w.value(i.operands[2], kind)}", kind)


@emits("shl", "shr")
def emit_shift(w: Writer, i: Instruction) -> None:
    """shl and shr, by a number below the width or by any register."""
    kind = kind_at_end(i)
    kind = kind if i.opcode == "shr" else kind_of(f"b{kind.bits}")
    a, count = w.value(i.operands[1], kind), w.integer(i.operands[2])
    if count is None or count & 0xFFFFFFFF >= kind.bits:
        return w.assign(i.operands[0], f"{i.opcode}({a}, {w.value(i.operands[2], 'u32')})", kind)
    w.assign(i.operands[0], f"{a} {'<<' if i.opcode == 'shl' else '>>'} {w.constant(count, kind.dtype)}", kind)


@emits("shf")
def emit_funnel_shift(w: Writer, i: Instruction) -> None:
    """shf: a shift of two registers as one."""
    low, high, count = (w.value(x, "b32") for x in i.operands[1:4])
    left, wrap = i.modifiers[0] == "l", "wrap" in i.modifiers
    w.assign(i.operands[0], f"funnel_shift({low}, {high}, {count}, {left}, {wrap})", "b32")


@emits("bfe")
def emit_extract(w: Writer, i: Instruction) -> None:
    """bfe: a field of bits."""
    kind = kind_at_end(i)
    a = w.value(i.operands[1], kind)
    at, size = (w.integer(x) for x in i.operands[2:4])
    if at is None or size is None or at + size > kind.bits or size == 0:
        at, size = (w.value(x, "u32") for x in i.operands[2:4])
        w.assign(i.operands[0], f"bfe({a}, {at}, {size})", kind)
    elif kind.letter == "s":
        up, down = (w.constant(n, kind.dtype) for n in (kind.bits - at - size, kind.bits - size))
        w.assign(i.operands[0], f"({a} << {up}) >> {down}", kind)
    else:
        mask = w.constant(2**size - 1, kind.dtype)
        w.assign(i.operands[0], f"({a} >> {w.constant(at, kind.dtype)}) & {mask}", kind)


@emits("bfi")
def emit_insert(w: Writer, i: Instruction) -> None:
    """bfi: a field of bits put into another number."""
    kind = kind_at_end(i)
    a, b = (w.value(x, kind) for x in i.operands[1:3])
    at, size = (w.integer(x) for x in i.operands[3:5])
    if at is None or size is None or at >= kind.bits:
        at, size = (w.value(x, "u32") for x in i.operands[3:5])
        return w.assign(i.operands[0], f"bfi({a}, {b}, {at}, {size})", kind)
    mask = (2**size - 1) << at
    into = f"(({a} << {w.constant(at, kind.dtype)}) & {w.constant(mask, kind.dtype)})"
    w.assign(i.operands[0], f"{into} | ({b} & {w.constant(~mask, kind.dtype)})", kind)


@emits("bmsk", "szext")
def emit_mask(w: Writer, i: Instruction) -> None:
    """bmsk and szext."""
    kind, wrap = kind_at_end(i), "wrap" in i.modifiers
    name = "bit_mask" if i.opcode == "bmsk" else "sign_extend"
    a, b = w.value(i.operands[1], kind), w.value(i.operands[2], "u32")
    w.assign(i.operands[0], f"{name}({a}, {b}, {wrap})", kind)


@emits("lop3")
def emit_logic_of_three(w: Writer, i: Instruction) -> None:
    """lop3: any function of three bits."""
    if len(i.operands) != 5:
        raise UnknownPTX("lop3 with a predicate")
    a, b, c = (w.value(x, "b32") for x in i.operands[1:4])
    table = w.integer(i.operands[4])
    if table is None:
        raise UnknownPTX("lop3 by a register")
    w.assign(i.operands[0], logic_of_three(a, b, c, table), "b32")


def logic_of_three(a: str, b: str, c: str, table: int) -> str:
    """An expression for bit 4 a + 2 b + c of a table: by its ones, or by its zeros where they are fewer."""
    if table in LOGIC_OF_THREE:
        return LOGIC_OF_THREE[table].format(a=a, b=b, c=c)
    inverse = bin(table).count("1") > 4
    terms = []
    for k in range(8):
        if bool(table >> k & 1) != inverse:
            factors = (x if k & bit else f"~{x}" for x, bit in ((a, 4), (b, 2), (c, 1)))
            terms.append(f"({' & '.join(factors)})")
    total = " | ".join(terms) or f"({a} & ~{a} | {b} & ~{b} | {c} & ~{c})"
    return f"~({total})" if inverse else total


@emits("prmt")
def emit_permute(w: Writer, i: Instruction) -> None:
    """prmt: any four of eight bytes."""
    mode = i.modifiers[-1] if i.modifiers[-1] != "b32" else None
    a, b, selector = (w.value(x, "b32") for x in i.operands[1:4])
    constant = w.integer(i.operands[3])
    if mode or constant is None:
        return w.assign(i.operands[0], f"prmt({a}, {b}, {selector}, {mode!r})", "b32")
    w.assign(i.operands[0], picked_bytes(w, a, b, constant), "b32")


def picked_bytes(w: Writer, a: str, b: str, selector: int) -> str:
    """An expression for prmt with a constant: bytes that move equally far move together."""
    moves: dict[tuple[str, int], int] = {}  # operand and bytes upwards -> mask of the bytes in the result
    terms = []
    for k in range(4):
        pick = selector >> 4 * k & 15
        source, at, mask = b if pick & 4 else a, pick & 3, 0xFF << 8 * k
        if pick & 8:
            up = w.constant(24 - 8 * at, "u4")
            terms.append(
                f"((({source} << {up}).view(i4) >> {w.constant(31, 'i4')}).view(u4) & {w.constant(mask, 'u4')})"
            )
        else:
            moves[source, k - at] = moves.get((source, k - at), 0) | mask
    for (source, up), mask in moves.items():
        moved = f"({source} {'<<' if up > 0 else '>>'} {w.constant(8 * abs(up), 'u4')})" if up else source
        rest = 0xFFFFFFFF << 8 * up & 0xFFFFFFFF if up >= 0 else 0xFFFFFFFF >> -8 * up  # what the shift leaves
        terms.append(moved if mask == rest else f"({moved} & {w.constant(mask, 'u4')})")
    return " | ".join(terms)


@emits("popc", "clz", "brev", "bfind")
def emit_count(w: Writer, i: Instruction) -> None:
    """popc, clz, bfind and brev."""
    kind = kind_at_end(i)
    a = w.value(i.operands[1], kind)
    if i.opcode == "brev":
        w.assign(i.operands[0], f"brev({a})", kind)
    else:
        shift = f", {'shiftamt' in i.modifiers}" if i.opcode == "bfind" else ""
        w.assign(i.operands[0], f"{i.opcode}({a}{shift})", "u32")
