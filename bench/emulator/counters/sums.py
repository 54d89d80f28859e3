"""The counters of a launch, summed: instructions by kind and source line, memory by access, work of tensor cores.

Everything that reads the names of counters, or the structure of a program, is `executed_instructions`; what the rest of
bench knows of a launch is the list that it returns.

Instructions are PTX, which ptxas turns into fewer: it drops most moves and joins address arithmetic. Memory accesses
and tensor-core products stay as they are.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...compiler.disassembly import BARRIER, CONVERT, FLOAT, GLOBAL, INTEGER, OTHER, SHARED, SPECIAL, SPILL, TENSOR
from ..report import Launch, own_line

SECTOR_BYTES = 32
WARP_THREADS = 32
MAX_WAVEFRONTS = 1.1  # for each access of shared memory; more is marked
MAX_SECTORS = 1.15  # of the fewest that hold the bytes of a request; more is marked
SPECIAL_FUNCTIONS = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos"}
BIT_FUNCTIONS = {"cvt", "prmt", "lop3", "shl", "shr", "shf", "and", "or", "xor", "not", "bfe", "bfi", "bfind", "popc"}
FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "tf32", "f32", "f32x2", "f64"}


@dataclass(frozen=True)
class ExecutedInstruction:
    """An instruction of a kernel and what it did in a launch; all counts are those of warps.

    source          "file.py:12"
    issued          warps that came to it; those whose threads a guard masks off are counted, as hardware issues them
    requests        of global memory, and the sectors of 32 bytes that they touch
    fewest_sectors  that could hold the bytes of each request
    accesses        of shared memory, as many as hardware needs without bank conflicts
    wavefronts      that the banks need for them
    flops           of tensor cores
    """

    opcode: str
    kind: str
    source: str
    issued: int
    requests: int
    sectors: int
    fewest_sectors: int
    accesses: int
    wavefronts: int
    flops: int

    @property
    def is_store(self) -> bool:
        """True if it writes memory; atomics do."""
        return self.opcode.split(".")[0] in ("st", "red", "atom", "stmatrix")


def executed_instructions(launch: Launch) -> list[ExecutedInstruction]:
    """Returns the instructions of a launch that a warp came to, in the order of the program."""
    executed = []
    for block in launch.program.kernel.blocks:
        issued = launch.entered[block.index]
        for x in block.instructions if issued else ():
            executed.append(
                ExecutedInstruction(
                    opcode=x.name,
                    kind=instruction_kind(x.name),
                    source=source_line(x.source, *x.callers),
                    issued=issued,
                    requests=launch.counts[x.id, "requests"],
                    sectors=launch.counts[x.id, "sectors"],
                    fewest_sectors=launch.counts[x.id, "fewest_sectors"],
                    accesses=launch.counts[x.id, "accesses"],
                    wavefronts=launch.counts[x.id, "wavefronts"],
                    flops=issued * flops_per_warp(x.name),
                )
            )
    return executed


def source_line(*lines: str) -> str:
    """Returns "file.py:12" of "/folder/file.py:12" and its callers, innermost first: of the first that is not Triton's
    own.
    """
    return Path(own_line(*lines)).name


def instruction_kind(opcode: str) -> str:
    """Returns the kind of an instruction of PTX, in the words of `bench.inspect`."""
    word, *modifiers = opcode.split(".")
    spaces = {modifier.split("::")[0] for modifier in modifiers}
    is_wait = {"commit_group", "wait_group", "wait_all", "fence"} & {word, *modifiers}
    if is_wait or word in ("bar", "barrier", "membar", "mbarrier", "fence", "griddepcontrol"):
        return BARRIER
    if word in ("mma", "wgmma", "tcgen05"):
        return TENSOR
    if word in ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix", "shfl", "prefetch"):
        if spaces & {"local", "param"}:
            return SPILL if "local" in spaces else OTHER
        is_shared = word in ("ldmatrix", "stmatrix", "shfl") or (word != "cp" and "shared" in spaces)
        return SHARED if is_shared else GLOBAL
    if word in SPECIAL_FUNCTIONS or (word == "div" and modifiers[-1] in FLOATS):
        return SPECIAL
    if word in BIT_FUNCTIONS and modifiers[-1:] != ["pred"]:
        return CONVERT
    if word in ("mov", "bra", "ret", "exit", "selp", "cvta", "vote", "activemask", "pragma"):
        return OTHER
    return FLOAT if FLOATS & set(modifiers) else INTEGER


def flops_per_warp(opcode: str) -> int:
    """Returns the floating-point operations that one warp does in a tensor-core instruction; four share a wgmma's."""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)", opcode)
    if not shape or instruction_kind(opcode) != TENSOR:
        return 0
    m, n, k = map(int, shape.groups())
    return 2 * m * n * k // (4 if opcode.startswith("wgmma") else 1)


@dataclass(frozen=True)
class MemoryTraffic:
    """The memory that several instructions touched: bytes are those of whole sectors, as the L2 cache delivers them."""

    requests: int
    sectors: int
    fewest_sectors: int
    read_bytes: int
    written_bytes: int
    accesses: int
    wavefronts: int

    @property
    def sector_ratio(self) -> float:
        """Sectors for each of the fewest; 1 where nothing was touched."""
        return self.sectors / self.fewest_sectors if self.fewest_sectors else 1.0

    @property
    def wavefront_ratio(self) -> float:
        """Wavefronts for each access; 1 where there was none."""
        return self.wavefronts / self.accesses if self.accesses else 1.0


def memory_traffic(instructions: Iterable[ExecutedInstruction]) -> MemoryTraffic:
    """Returns the sums of what these instructions moved."""
    some = list(instructions)
    names = ("requests", "sectors", "fewest_sectors", "accesses", "wavefronts")
    requests, sectors, fewest, accesses, wavefronts = (sum(getattr(x, name) for x in some) for name in names)
    written = SECTOR_BYTES * sum(x.sectors for x in some if x.is_store)
    return MemoryTraffic(requests, sectors, fewest, SECTOR_BYTES * sectors - written, written, accesses, wavefronts)


def memory_accesses(
    instructions: Iterable[ExecutedInstruction],
) -> Iterator[tuple[str, str, MemoryTraffic]]:
    """Yields (source line, opcode, traffic) of the instructions that touched memory, those of one line and opcode as
    one.
    """
    groups: dict[tuple[str, str], list[ExecutedInstruction]] = defaultdict(list)
    for x in instructions:
        if x.requests or x.accesses:
            groups[x.source, memory_opcode(x.opcode)].append(x)
    for (source, opcode), group in groups.items():
        yield source, opcode, memory_traffic(group)


def memory_opcode(opcode: str) -> str:
    """Returns an opcode without what does not change what it touches: cache hints, order, scope and alignment."""
    parts = [part.split("::")[0] for part in opcode.split(".")]
    kept = r"ld|st|atom|red|cp|async|global|shared|ldmatrix|stmatrix|trans|[vx]\d|[bsuf]\d+|bf16x?\d*|add|max|min|cas"
    words = [part for part in parts if re.fullmatch(kept, part)]
    return ".".join(words if words[0] != "cp" else words[:2])


def instructions_by_kind(instructions: Iterable[ExecutedInstruction]) -> dict[str, int]:
    """Returns {kind: instructions that warps issued}, the most frequent kind first."""
    sums: dict[str, int] = defaultdict(int)
    for x in instructions:
        sums[x.kind] += x.issued
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def instructions_by_line(instructions: Sequence[ExecutedInstruction]) -> dict[str, dict[str, int]]:
    """Returns {source line: {kind: instructions that warps issued}}, the line with the most first."""
    lines: dict[str, list[ExecutedInstruction]] = defaultdict(list)
    for x in instructions:
        lines[x.source].append(x)
    sums = {source: instructions_by_kind(some) for source, some in lines.items()}
    return dict(sorted(sums.items(), key=lambda item: -sum(item[1].values())))
