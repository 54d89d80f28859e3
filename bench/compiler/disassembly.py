"""Assembly as instructions and loops: the purpose of each instruction, the bytes it moves and its source line.

NVIDIA's assembly (SASS) comes from `nvdisasm` of the Triton wheel, AMD's is the `amdgcn` text that Triton keeps.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

TENSOR, GLOBAL, SHARED, SPILL = "tensor core", "global memory", "shared memory", "spill"
CONVERT, FLOAT, SPECIAL = "convert and bits", "float", "special function"
INTEGER, BARRIER, OTHER = "integer and address", "barrier and wait", "move and branch"
KINDS = (TENSOR, FLOAT, SPECIAL, CONVERT, INTEGER, GLOBAL, SHARED, SPILL, BARRIER, OTHER)

# The whole first word of an opcode. CUDA binary utilities, instruction set reference.
SASS_PATTERNS = {
    TENSOR: r"(H|I|Q|B|D|O)G?MMA|UTC[A-Z]*MMA",
    GLOBAL: r"LDG|LDGSTS|STG|LD|ST|RED|REDG|ATOM|ATOMG|UTMA(LDG|STG|REDG|PF)|UBLK(CP|RED|PF)",
    SHARED: r"LDSM?|STSM?|ATOMS|SHFL|LDTM|STTM|UTCCP",
    SPILL: r"LDL|STL",
    CONVERT: r"I2FP?|F2FP?|F2I|I2I|FRND|U?PRMT|U?LOP3?|U?SHF|U?SHL|U?SHR|U?SGXT|U?BMSK|POPC|BREV|FLO|IDP",
    FLOAT: r"F(ADD|MUL|FMA|MNMX3?|SETP?|SEL|SWZADD|CHK)2?|H(ADD|MUL|FMA|MNMX|SETP?)2|D(ADD|MUL|FMA|SETP)",
    SPECIAL: r"MUFU",
    INTEGER: r"U?(I?ADD3?|VIADD|IMAD|IMUL|LEA|ISETP|IMNMX|VIMNMX3?|IABS|VIADDMNMX)|UVIADD|UVIMNMX",
    BARRIER: r"BAR|U?DEPBAR|LDGDEPBAR|LDGSTS?DEPBAR|WARPSYNC|SYNCS|MEMBAR|FENCE|ARRIVES|WARPGROUP|UTCBAR|ERRBAR|BSYNC",
}
# How an opcode begins. AMD, CDNA3 instruction set architecture.
AMDGCN_PATTERNS = {
    TENSOR: r"v_s?mfma",
    GLOBAL: r"(global|buffer|flat|s)_(load|store|atomic)|s_buffer_load",
    SHARED: r"ds_",
    SPILL: r"scratch_",
    CONVERT: r"v_cvt|[vs]_(and|or|not|xor|xnor|bfe|bfi|perm|alignb|lshl_or|and_or|or3|(lshl|lshr|ashr)(rev)?_[biu])",
    FLOAT: r"v_(pk_)?(add|sub|mul|fma|fmac|mad|max|min|max3|min3|dot\w*|cmp_\w+|cmpx_\w+|ldexp)_(legacy_)?(b?f)\d",
    SPECIAL: r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    INTEGER: r"[vs]_(add|addc|sub|subb|mul|mad|lshl|lshl[1-4]|max|min|cmp|cmpk|addk|mulk|lshl_add|add_lshl|add3|xad)",
    BARRIER: r"s_barrier|s_waitcnt|s_sleep",
}
# Bytes a thread moves, by what the opcode says of it; NVIDIA's default is a word.
SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
AMDGCN_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1, "b128": 16, "b64": 8}


@dataclass(frozen=True)
class Instruction:
    """One instruction. `label` is set if a branch may land here, `target` if it is a branch; `falls_through`: the next
    instruction may run after it.
    """

    text: str
    opcode: str  # without its predicate
    kind: str
    file: str
    line: int
    label: str = ""
    target: str = ""
    falls_through: bool = True

    @property
    def bytes_per_thread(self) -> int:
        """Bytes that one thread moves between memory and registers, or shared memory."""
        if "_" in self.opcode:
            return next((n for word, n in AMDGCN_WIDTHS.items() if word in self.opcode), 4)
        return next((n for word, n in SASS_WIDTHS.items() if word in self.opcode.split(".")), 4)

    @property
    def is_load(self) -> bool:
        """True if it reads global memory."""
        return self.kind == GLOBAL and bool(re.match(r"LD|U\w+LDG|\w+_load", self.opcode))

    @property
    def is_store(self) -> bool:
        """True if it writes global memory."""
        return self.kind == GLOBAL and bool(re.match(r"ST|RED|ATOM|U\w+(STG|RED)|\w+_(store|atomic)", self.opcode))

    @property
    def base_opcode(self) -> str:
        """The opcode without modifiers that concern caches: LDG.E.128 -> LDG.128; buffer_load_dwordx4
        stays as it is.
        """
        parts = [w for w in self.opcode.split(".") if not re.fullmatch(r"E|EF|EL|LU|SYS|GPU|STRONG|CONSTANT|NA|EU", w)]
        return ".".join(w for w in parts if not re.fullmatch(r"BYPASS|LTC\w+|DEFER_BLOCKING|ALIGNED|SYNC", w))


def classify(opcode: str, patterns: dict[str, str], full_match: bool) -> str:
    """Returns the kind of an opcode by its first word, which matches a pattern as a whole or at its beginning."""
    word = opcode.split(".")[0]
    match = re.fullmatch if full_match else re.match
    return next((kind for kind, pattern in patterns.items() if match(pattern, word)), OTHER)


def parse_sass(text: str) -> list[Instruction]:
    """Returns the instructions of the output of `nvdisasm -g -c`."""
    instructions, file, line, label = [], "", 0, ""
    for row in text.splitlines():
        if location := re.search(r'//## File "(.+?)", line (\d+)', row):
            file, line = location[1], int(location[2])
        elif label_line := re.match(r"(\.L_x_\d+):", row):
            label = label_line[1]
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P(?:\d|T)\s+)?([A-Z][A-Zx0-9_.]*)\s*(.*?)\s*;", row):
            predicate, opcode, operands = code.groups()
            disabled = predicate is not None and predicate.strip() == "@!PT"  # fills a slot and does nothing
            target = re.search(r"`\((\.L_x_\d+)\)", operands) if opcode.startswith("BRA") else None
            unconditional = not predicate and (opcode == "EXIT" or bool(target and operands.startswith("`")))
            kind = OTHER if disabled else classify(opcode, SASS_PATTERNS, full_match=True)
            body = f"{predicate or ''}{opcode} {operands}".strip()
            instructions.append(
                Instruction(body, opcode, kind, file, line, label, target[1] if target else "", not unconditional)
            )
            label = ""
    return instructions


def parse_amdgcn(text: str) -> list[Instruction]:
    """Returns the instructions of Triton's `amdgcn` text."""
    files = {n: f"{folder}/{name}" for n, folder, name in re.findall(r'\.file\s+(\d+) "(.+?)" "(.+?)"', text)}
    instructions, file, line, label = [], "", 0, ""
    for row in text.splitlines():
        row = row.split(";")[0]
        if location := re.match(r"\s+\.loc\s+(\d+) (\d+)", row):
            file, line = files.get(location[1], ""), int(location[2])
        elif label_line := re.match(r"(\.LBB\w+):", row):
            label = label_line[1]
        elif code := re.match(r"\s+([a-z]\w+)\s*(.*?)\s*$", row):
            opcode, operands = code.groups()
            target = operands if opcode == "s_branch" or opcode.startswith("s_cbranch") else ""
            falls_through = opcode not in ("s_branch", "s_endpgm")
            kind = classify(opcode, AMDGCN_PATTERNS, full_match=False)
            instructions.append(
                Instruction(f"{opcode} {operands}", opcode, kind, file, line, label, target, falls_through)
            )
            label = ""
            if opcode == "s_endpgm":
                break
    return instructions


@dataclass(frozen=True)
class Loop:
    """A natural loop: the indices of its instructions, in order. Where a kernel has no loop, the whole kernel stands
    in.
    """

    indices: Sequence[int]
    is_whole_kernel: bool = False


def basic_blocks(code: Sequence[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Returns the basic blocks, and for each the blocks it may branch or fall through to."""
    starts = {
        0,
        *(i + 1 for i, x in enumerate(code) if x.target or not x.falls_through),
        *(i for i, x in enumerate(code) if x.label),
    }
    bounds = sorted(s for s in starts if s < len(code))
    blocks = [range(a, b) for a, b in zip(bounds, [*bounds[1:], len(code)])]
    block_of_label = {code[block[0]].label: i for i, block in enumerate(blocks) if code[block[0]].label}
    successors = []
    for i, block in enumerate(blocks):
        last = code[block[-1]]
        targets = [i + 1] if last.falls_through and i + 1 < len(blocks) else []
        successors.append(targets + ([block_of_label[last.target]] if last.target in block_of_label else []))
    return blocks, successors


def natural_loops(code: Sequence[Instruction]) -> list[Loop]:
    """Returns the natural loops, in the order of their first instructions. An edge to a block that dominates its source
    closes a loop; the loop contains all blocks that reach the edge without passing that block.
    """
    blocks, successors = basic_blocks(code)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for i, targets in enumerate(successors):
        for j in targets:
            predecessors[j].append(i)
    reached = reachable_blocks([0], successors, frozenset())
    dominators = {i: set(reached) for i in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            dominating = {i} | set.intersection(*(dominators[j] for j in predecessors[i] if j in reached))
            changed |= dominating != dominators[i]
            dominators[i] = dominating
    bodies: dict[int, set[int]] = {}
    for i in reached:
        for head in successors[i]:
            if head in dominators[i]:
                bodies.setdefault(head, set()).update({head} | reachable_blocks([i], predecessors, frozenset([head])))
    return [Loop([n for i in sorted(body) for n in blocks[i]]) for _, body in sorted(bodies.items())]


def reachable_instructions(code: Sequence[Instruction]) -> list[int]:
    """Returns the indices of the instructions that can run, without the padding at the end."""
    blocks, successors = basic_blocks(code)
    return [n for i in sorted(reachable_blocks([0], successors, frozenset())) for n in blocks[i]]


def reachable_blocks(start: Iterable[int], edges: Sequence[Sequence[int]], excluded: frozenset[int]) -> set[int]:
    """Returns the blocks that can be reached without entering the excluded ones."""
    visited: set[int] = set()
    pending = [i for i in start if i not in excluded]
    while pending:
        i = pending.pop()
        if i not in visited:
            visited.add(i)
            pending += [j for j in edges[i] if j not in excluded]
    return visited


def main_loops(code: Sequence[Instruction]) -> list[Loop]:
    """Returns the innermost loops that do the work, the largest first.

    These are the loops with tensor-core instructions; if there is none, those with floating-point arithmetic; if there
    is none, those that access global memory. A kernel without a loop counts as a whole. A loop around a
    compare-and-swap that loads nothing else is an atomic addition that is tried again, and does not count.
    """
    candidates = [loop for loop in natural_loops(code) if not is_cas_retry_loop(code, loop)]

    def innermost(kind: str) -> Iterator[Loop]:
        containing = [loop for loop in candidates if any(code[i].kind == kind for i in loop.indices)]
        for loop in containing:
            if not any(other is not loop and set(other.indices) < set(loop.indices) for other in containing):
                yield loop

    for kind in (TENSOR, FLOAT, GLOBAL):
        if best := sorted(innermost(kind), key=lambda loop: -len(loop.indices)):
            return best
    return [Loop(range(len(code)), is_whole_kernel=True)]


def is_cas_retry_loop(code: Sequence[Instruction], loop: Loop) -> bool:
    """Returns whether a loop only repeats a compare-and-swap."""
    body = [code[i] for i in loop.indices]
    return any(re.search(r"\.CAS|cmpswap", x.opcode) for x in body) and not any(x.is_load for x in body)
