"""The work that one iteration of a kernel's main loop does, per thread block, read from TTGIR (the last IR with tiles).

The assembly gives the instructions of one thread, and its loop may be unrolled. The figure per weight, or per score of
attention, is

    instructions of the loop * threads of the block / (unroll factor * weights per iteration of the source)

    unroll factor   bytes a thread loads in the assembly's loop at the source line of its largest load, over the bytes
                    that the layout of this load gives a thread per iteration
    scores          elements of the largest tile that is exponentiated
    weights         codes in the largest integer tile that is loaded, 8 per int32 or 1 per element if each code has a
                    pointer of its own, if the iteration multiplies that many; all tiles of that shape are counted

There is no figure where the width of a load is unknown (tensor memory accelerator) or the quotient is no integer.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .disassembly import Instruction

LOADS = r"tt\.load|ttg\.async_copy_global_to_local|amdg\.buffer_load|tt\.descriptor_load"
TILE = r"tensor<((?:\d+x)+)(?:!tt\.ptr<(\w+)>|(\w+)), (#.+?)>(?: loc|,| ->)"
SourceLine = tuple[str, int]  # file, line


@dataclass(frozen=True)
class Load:
    """A tile loaded from global memory: its source line, shape and dtype, and the elements that a thread gets, if
    known.
    """

    source_line: SourceLine
    shape: tuple[int, ...]
    dtype: str
    elements_per_thread: int | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        return int("".join(filter(str.isdigit, self.dtype)))


@dataclass(frozen=True)
class LoopIteration:
    """One iteration of a loop of the source, or the whole kernel.

    loads           the loads of an iteration
    exponentials    elements of the largest tile it exponentiates
    dots            elements of the left and right operand of each matrix product; one may be cut up along k
    products        multiplications of single elements
    """

    loads: Sequence[Load]
    exponentials: int
    dots: Sequence[tuple[int, int]]
    products: int

    @property
    def codes(self) -> Sequence[Load]:
        """The loads of integer tiles of the largest shape; they load 4-bit codes if `weights` is not 0."""
        packed = [load for load in self.loads if load.dtype.startswith("i")]
        largest = max(packed, key=lambda load: load.elements, default=None)
        return [load for load in packed if largest and load.shape == largest.shape]

    @property
    def weights(self) -> int:
        """The 4-bit codes that an iteration dequantizes; 0 if none of its products has as many."""
        if not self.codes:
            return 0
        tiles, load = len(self.codes), self.codes[0]
        counts = (tiles * load.elements * load.bits // 4, tiles * load.elements)
        if not self.dots:  # each code is in a product or more
            return next((n for n in counts if n <= self.products), 0)
        factors = {sum(side) for side in zip(*self.dots)} | {tiles * n for dot in self.dots for n in dot}
        return next((n for n in counts if n in factors), 0)

    def weight_loads(self, body: Sequence[Instruction]) -> tuple[list[Instruction], bool]:
        """Returns the instructions of a loop that load codes, and whether no other load stands at the
        same source line.
        """
        lines = {load.source_line for load in self.codes} if self.weights else set()
        exclusive = not lines & {load.source_line for load in self.loads if load not in self.codes}
        return [x for x in body if x.is_load and (x.file, x.line) in lines], exclusive


def source_loops(ttgir: str) -> Iterator[LoopIteration]:
    """Yields every loop of the kernel, and last the kernel itself."""
    rows = ttgir.splitlines()
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.+>)$", ttgir, re.M))
    source_lines = source_locations(ttgir)
    for start, row in enumerate(rows):
        if opened := re.match(r"( *)(?:%\S+ = )?scf\.(?:for|while) ", row):
            end = next(i for i in range(start + 1, len(rows)) if rows[i].startswith(opened[1] + "}"))
            yield parse_iteration(rows[start + 1 : end], layouts, source_lines)
    yield parse_iteration(rows, layouts, source_lines)


def parse_iteration(rows: Sequence[str], layouts: dict[str, str], source_lines: dict[str, SourceLine]) -> LoopIteration:
    """Returns the work in some lines of TTGIR."""
    loads, exponentials, dots, products = [], 0, [], 0
    for row in rows:
        if tile := re.search(r"= math\.exp2? .* : tensor<((?:\d+x)+)", row):
            exponentials = max(exponentials, num_elements(tile[1]))
        sizes = [num_elements(tile) for tile in re.findall(r"(?:tensor|memdesc)<((?:\d+x)+)", row)]
        if re.search(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ", row):
            dots.append((sizes[0], sizes[1]))
        if re.search(r"\b(arith\.mulf|math\.fma) ", row) and sizes:
            products += sizes[0]
        if re.search(rf"= (?:{LOADS}) ", row) and (tile := re.search(TILE, row)):
            shape = tuple(map(int, tile[1][:-1].split("x")))
            location = re.search(r"loc\((#\w+)\)$", row)
            source_line = source_lines.get(location[1], ("", 0)) if location else ("", 0)
            loads.append(Load(source_line, shape, tile[2] or tile[3], elements_per_thread(shape, tile[4], layouts)))
    return LoopIteration(loads, exponentials, dots, products)


def num_elements(shape: str) -> int:
    """Returns the number of elements of a shape as MLIR writes it: 16x64x."""
    return math.prod(map(int, shape[:-1].split("x")))


def elements_per_thread(shape: Sequence[int], layout: str, layouts: dict[str, str]) -> int | None:
    """Returns the elements of a tile that one thread has in a blocked layout or a slice of one; None
    for other layouts.
    """
    if sliced := re.fullmatch(r"#ttg\.slice<\{dim = (\d), parent = (#.+)\}>?", layout):
        parent = layouts.get(sliced[2], sliced[2])
        if not parent.startswith("#ttg.blocked"):
            return None
        dim = int(sliced[1])
        spans = [axis for i, axis in enumerate(blocked_layout(parent)) if i != dim]
    else:
        parent = layouts.get(layout, layout)
        if not parent.startswith("#ttg.blocked"):
            return None
        spans = blocked_layout(parent)
    return math.prod(per * -(-n // (per * threads)) for n, (per, threads) in zip(shape, spans, strict=True))


def blocked_layout(layout: str) -> list[tuple[int, int]]:
    """Returns for each axis of a blocked layout the consecutive elements of a thread, and the threads
    along the axis.
    """
    per, threads, warps = (
        list(map(int, re.findall(r"\d+", match[1])))
        for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
        if (match := re.search(rf"{name} = \[(.+?)\]", layout))
    )
    return [(n, t * w) for n, t, w in zip(per, threads, warps, strict=True)]


def source_locations(ttgir: str) -> dict[str, SourceLine]:
    """Returns the file and line of each location name. Inlined code has its own location, not the call's, as in line
    tables.
    """
    resolved: dict[str, SourceLine] = {}
    definitions = dict(re.findall(r"^(#loc\d*) = loc\((.+)\)$", ttgir, re.M))
    for name in definitions:
        end, visited = name, set()
        while end in definitions and end not in visited:
            visited.add(end)
            text = definitions[end]
            if location := re.match(r'"(.+?)":(\d+):', text):
                resolved[name] = location[1], int(location[2])
                break
            inner = re.search(r"#loc\d*", text)
            end = inner[0] if inner else ""
    return resolved


def unroll_factor(
    ttgir: str, body: Sequence[Instruction], whole_kernel: bool = False
) -> tuple[int, LoopIteration] | None:
    """Returns the iterations that a loop of the assembly does per turn, and of which loop of the source; None if
    unknown.

    With `whole_kernel` the assembly has no loop; if the source has none either, that is one iteration.
    """
    iterations = list(source_loops(ttgir))
    if whole_kernel and len(iterations) == 1:
        return 1, iterations[0]
    loaded_bytes: Counter[SourceLine] = Counter()
    for x in body:
        if x.is_load:
            loaded_bytes[x.file, x.line] += x.bytes_per_thread
    best = max(iterations, key=lambda turn: overlap(turn, loaded_bytes))
    unknown = {load.source_line for load in best.loads if load.elements_per_thread is None}
    tile_bytes: Counter[SourceLine] = Counter()
    for load in best.loads:
        if load.elements_per_thread is not None and load.source_line not in unknown:
            tile_bytes[load.source_line] += load.elements_per_thread * load.bits // 8
    if not tile_bytes:
        return None
    largest = max(tile_bytes, key=lambda place: tile_bytes[place])
    factor, remainder = divmod(loaded_bytes[largest], tile_bytes[largest])
    return None if remainder or not factor else (factor, best)


def overlap(iteration: LoopIteration, loaded_bytes: Counter[SourceLine]) -> float:
    """Returns the share of source lines that the loads of an iteration and of a loop have in common."""
    lines = {load.source_line for load in iteration.loads}
    return len(lines & loaded_bytes.keys()) / max(1, len(lines | loaded_bytes.keys()))
