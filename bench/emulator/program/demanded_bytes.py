"""The bytes of registers that anything depends on.

Compilers leave registers unwritten of which nothing is used: a conversion of four bytes in one instruction may be given
two. So reading such a register is no fault, unless what is made of it matters in memory, tensor cores or branches.
"""

from collections.abc import Callable, Iterable

from .kinds import Kind, is_kind, kind_of
from .ptx import Immediate, Instruction, Operand, Register, Vector
from .writer import Step

ALL = 0xFF  # of eight bytes, a bit each
Bytes = dict[str, int]  # register -> its bytes
CARRY_UP = {"add", "sub", "mul", "mad", "neg"}  # of integers: a byte is made of the same and lower ones
SAME_BYTES = {"and", "or", "xor", "not", "mov", "lop3", "selp"}  # a byte of the result is made of the same of operands


def demanded_bytes(steps: Iterable[Step], only_computes: Callable[[Step], bool]) -> Bytes:
    """The bytes of each register that matter anywhere in a kernel."""
    order = list(steps)[::-1]
    demanded: Bytes = {}
    changed = True
    while changed:
        changed = False
        for step in order:
            for name, mask in operand_bytes(step, demanded, only_computes(step)).items():
                if mask & ~demanded.get(name, 0):
                    demanded[name] = demanded.get(name, 0) | mask
                    changed = True
    return demanded


def operand_bytes(step: Step, demanded: Bytes, only_computes: bool) -> Bytes:
    """The bytes of the registers that a step reads that matter, if those of its results do that are `demanded`."""
    everything = dict.fromkeys(step.reads, ALL)
    if not only_computes:
        return everything | stored_bytes(step.instruction)
    wanted = 0
    for name in step.writes:
        wanted |= demanded.get(name, 0)
    i = step.instruction
    guard = {i.guard.name: ALL} if i.guard else {}
    if not wanted:
        return guard
    selector = i.operands[3] if i.opcode == "prmt" else None
    if isinstance(selector, Immediate) and i.modifiers == ("b32",):
        return guard | permuted_bytes(i, selector.value, wanted)
    if i.opcode == "mov" and any(isinstance(x, Vector) for x in i.operands):
        return guard | packed_bytes(i, demanded)
    kinds = [kind_of(m) for m in i.modifiers if is_kind(m)]
    if i.opcode == "cvt" and (converted := converted_bytes(i, kinds, wanted)) is not None:
        return converted | guard
    if i.opcode in ("shl", "shr") and isinstance(i.operands[2], Immediate):
        size = kinds[-1].bits // 8
        return mask_of(i.operands[1], shifted_bytes(i, size, kinds[-1].letter == "s", wanted)) | guard
    if i.opcode in CARRY_UP and not {"cc", "sat", "hi", "wide"} & set(i.modifiers) and kinds[-1].letter in "usb":
        lower = (1 << wanted.bit_length()) - 1
        return {r.name: lower for r in registers(i.operands[1:])} | guard
    if i.opcode == "and" and isinstance(i.operands[2], Immediate) and kinds[-1].bits > 1:
        held = sum(1 << k for k in range(8) if i.operands[2].value >> 8 * k & 0xFF)
        return mask_of(i.operands[1], wanted & held) | guard
    if i.opcode in SAME_BYTES:
        return {r.name: ALL if r.bits == 1 else wanted for r in registers(i.operands[1:])} | guard
    return everything


def mask_of(operand: Operand, mask: int) -> Bytes:
    """Bytes of a register; of what is none nothing."""
    return {operand.name: mask} if isinstance(operand, Register) else {}


def stored_bytes(i: Instruction) -> Bytes:
    """st: of the registers that are stored, and are no part of the address, the bytes that the memory takes."""
    if i.opcode != "st" or "param" in i.modifiers or not is_kind(i.modifiers[-1]):
        return {}
    address = {r.name for r in registers([getattr(i.operands[0], "base", i.operands[0])])}
    address |= {i.guard.name} if i.guard else set()
    taken = (1 << kind_of(i.modifiers[-1]).bits // 8) - 1
    return {r.name: taken for r in registers(i.operands[1:2]) if r.name not in address}


def converted_bytes(i: Instruction, kinds: list[Kind], wanted: int) -> Bytes | None:
    """cvt between integers, and of pairs of floating-point numbers; None for others."""
    register = i.operands[0]
    if len(kinds) != 2 or not isinstance(register, Register) or register.bits != kinds[0].bits:
        return None
    to, source = kinds
    if to.lanes == 2:
        half = to.bits // 16
        low, high = wanted & (1 << half) - 1, wanted >> half
        if len(i.operands) == 3:  # of two numbers, the high one first
            return dict.fromkeys((r.name for r in registers(i.operands[2 - bool(high) : 2 + bool(low)])), ALL)
        if source.lanes == 2 and len(i.operands) == 2:
            part = (1 << source.bits // 16) - 1
            return mask_of(i.operands[1], part * bool(low) | part * bool(high) << source.bits // 16)
        return None
    if to.letter in "us" and source.letter in "us" and i.modifiers == (to.text, source.text):
        size = source.bits // 8
        sign = 1 << size - 1 if source.letter == "s" and wanted >> size else 0
        return mask_of(i.operands[1], wanted & (1 << size) - 1 | sign)
    return None


def shifted_bytes(i: Instruction, size: int, signed: bool, wanted: int) -> int:
    """shl and shr by a constant: the bytes of an operand of `size` bytes that the result's are made of."""
    amount = i.operands[2]
    assert isinstance(amount, Immediate)
    distance = amount.value if i.opcode == "shr" else -amount.value
    needed = 0
    for k in range(size):
        if wanted >> k & 1:
            for bit in (8 * k + distance, 8 * k + 7 + distance):
                if 0 <= bit < 8 * size:
                    needed |= 1 << bit // 8
                elif bit >= 8 * size and signed:
                    needed |= 1 << size - 1
    return needed


def permuted_bytes(i: Instruction, selector: int, wanted: int) -> Bytes:
    """prmt with a constant: each byte of the result is one of its operands', or the sign of one."""
    needed: Bytes = {}
    for k in range(4):
        if wanted >> k & 1:
            pick = selector >> 4 * k & 7
            source = i.operands[1 + (pick >> 2)]
            if isinstance(source, Register):
                needed[source.name] = needed.get(source.name, 0) | 1 << (pick & 3)
    return needed


def packed_bytes(i: Instruction, demanded: Bytes) -> Bytes:
    """mov between a register and a vector of its parts."""
    to, source = i.operands
    if isinstance(to, Vector) and isinstance(source, Register):
        size = source.bits // 8 // len(to.items)
        parts = enumerate(to.items)
        masks = [demanded.get(r.name, 0) % (1 << size) << n * size for n, r in parts if isinstance(r, Register)]
        return {source.name: sum(masks)}
    if isinstance(source, Vector) and isinstance(to, Register):
        size = to.bits // 8 // len(source.items)
        whole = demanded.get(to.name, 0)
        needed: Bytes = {}
        for n, r in enumerate(source.items):
            if isinstance(r, Register):
                needed[r.name] = needed.get(r.name, 0) | (whole >> n * size) % (1 << size)
        return needed
    return {r.name: ALL for r in registers(i.operands[1:])}


def registers(operands: Iterable[Operand]) -> list[Register]:
    """The registers among operands, those of vectors too."""
    items = [x for operand in operands for x in (operand.items if isinstance(operand, Vector) else (operand,))]
    return [x for x in items if isinstance(x, Register)]
