"""The bytes of registers that anything depends on.

Compilers leave registers unwritten of which nothing is used: a conversion of four bytes in one instruction may be given
two. So reading such a register is no fault, unless what is made of it matters in memory, tensor cores or branches.
"""

from collections.abc import Callable, Iterable

from .ptx import Immediate, Instruction, Operand, Register, Vector
from .writer import Step

ALL = 0xFF  # of eight bytes, a bit each
Bytes = dict[str, int]  # register -> its bytes
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
        return everything
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
    if i.opcode in SAME_BYTES:
        return {r.name: ALL if r.bits == 1 else wanted for r in registers(i.operands[1:])} | guard
    return everything


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
