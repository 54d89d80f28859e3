"""Small faults by rule in the PTX of a kernel: a barrier dropped, a bound off by one, two codes of a word swapped."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..emulator.program.ptx import Instruction, Kernel, Operand, Register, Vector

NEXT_COMPARISON = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
MEMORY = {"ld", "st", "atom", "red", "cp"}
PASSES_BITS = {"and", "or", "xor", "not", "mov", "selp", "cvt"}  # what a mask goes through on its way to memory


@dataclass(frozen=True)
class Rule:
    """A kind of fault: how its instruction is written, and what stands there instead.

    orders  the instruction orders accesses: dropping it is a fault where it separates two (see `separators`)
    bound   the instruction compares: a fault where its result decides who accesses memory
    most    faults to plant in a kernel, spread evenly over its instructions; None: one for each instruction
    """

    name: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str] = ""
    orders: bool = False
    bound: bool = False
    most: int | None = None


RULES = (
    Rule("barrier dropped", r"bar\.sync\s+\d+;", orders=True),
    Rule("warp barrier dropped", r"bar\.warp\.sync\s+[^;]+;", orders=True),
    Rule("wait for copies dropped", r"cp\.async\.wait_group\s+\d+;", orders=True),
    Rule("wait for products dropped", r"wgmma\.wait_group\.sync\.aligned\s+\d+;", orders=True),
    Rule("proxy fence dropped", r"fence\.proxy\.async[\w.:]*;", orders=True),
    Rule("order of a count dropped", r"atom\.global\.gpu\.acq_rel", "atom.global.gpu.relaxed"),
    Rule(
        "bound off by one",
        r"setp\.(l[te]|g[te])(?=\.[su]\d\d\s)",
        lambda m: f"setp.{NEXT_COMPARISON[m[1]]}",
        bound=True,
    ),
    Rule("other codes of a word", r"\b0x000f000f\b", "0x00f000f0", most=4),
    Rule("codes of a word swapped", r"shr\.u32\s+h,\s*(%\w+),\s*4;", r"shr.u32 h, \1, 8;", most=4),
    Rule(
        "weight in 16 bits",
        r"mov\.b32\s+(%r\d+),\s*(%r\d+);(?=\s*// end inline asm)",
        r"{ .reg .b16 half; cvt.u16.u32 half, \2; mov.b16 half, half; cvt.u32.u16 \1, half; }",
        most=4,
    ),
)


class OtherKernelError(Exception):
    """A kernel was compiled otherwise than the one that an edit is for."""


@dataclass(frozen=True)
class Edit:
    """A fault to plant: other text at one place of the PTX of a kernel."""

    kernel: str
    text_hash: int
    rule: Rule
    instruction: Instruction
    start: int
    before: str
    after: str

    def apply(self, text: str) -> str:
        """Returns the text of the kernel with the fault; that of another kernel as it is. Errors: OtherKernelError."""
        if not re.search(rf"\.entry\s+{re.escape(self.kernel)}\b", text):
            return text
        if hash(text) != self.text_hash:
            raise OtherKernelError(self.kernel)
        return text[: self.start] + self.after + text[self.start + len(self.before) :]


def find_edits(kernel: Kernel, text: str) -> Iterator[Edit]:
    """Yields the faults that can be planted in a kernel whose PTX is `text`, rule by rule."""
    instructions = [x for block in kernel.blocks for x in block.instructions]
    places = find_places(instructions, text)
    masks = mask_registers(instructions)
    for rule in RULES:
        edits = []
        for instruction, (start, end) in zip(instructions, places):
            found = re.compile(rule.pattern).search(text, start)
            if not found or found.start() >= end or (rule.bound and not set(written(instruction)) & masks):
                continue
            after = rule.replacement if isinstance(rule.replacement, str) else rule.replacement(found)
            edits.append(Edit(kernel.name, hash(text), rule, instruction, found.start(), found[0], found.expand(after)))
        yield from edits if rule.most is None else spread(edits, rule.most)


def spread(edits: Sequence[Edit], most: int) -> list[Edit]:
    """Returns `most` of them, evenly spread, or all of fewer."""
    step = max(1.0, len(edits) / most)
    return [edits[int(n * step)] for n in range(min(most, len(edits)))]


def find_places(instructions: Sequence[Instruction], text: str) -> list[tuple[int, int]]:
    """Returns where each instruction stands in the text: (start, end)."""
    places, at = [], text.index("{", text.index(".entry"))
    for instruction in instructions:
        pattern = r"\s+".join(map(re.escape, instruction.text.split()))
        found = re.compile(pattern.replace(";", r"\s*;")).search(text, at)
        assert found, instruction.text
        places.append(found.span())
        at = found.end()
    return places


def registers(*operands: Operand | None) -> Iterator[str]:
    """Yields the names of the registers of operands, those of addresses left out."""
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.name
        elif isinstance(operand, Vector):
            yield from registers(*operand.items)


def written(instruction: Instruction) -> Iterator[str]:
    """Yields the registers that an instruction other than a store writes."""
    return registers(*instruction.operands[:1])


def mask_registers(instructions: Sequence[Instruction]) -> set[str]:
    """Returns the registers whose bits decide which threads access memory: guards, the number of bytes that cp.async
    copies, and what those were computed from by logic alone.
    """
    masks: set[str] = set()
    for x in instructions:
        if x.opcode in MEMORY:
            masks |= set(registers(x.guard, *(x.operands[3:] if x.opcode == "cp" else ())))
    while True:
        sources = {
            name
            for x in instructions
            if x.opcode in PASSES_BITS or (x.opcode == "setp" and x.modifiers[0] in ("eq", "ne"))
            if set(written(x)) & masks
            for name in registers(*x.operands[1:], x.guard)
        }
        if sources <= masks:
            return masks
        masks |= sources
