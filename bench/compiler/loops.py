"""What one turn of a loop does for a whole block: read from TTGIR, Triton's last representation that knows tiles.

The loop of the assembly may do several turns of the loop of the source (compilers unroll) and its instructions are one
thread's. So a figure per weight or score needs three things, none of which is guessed:

    turns    bytes a thread loads in the assembly's loop at the source line of its largest load
             / bytes the layout of that load gives a thread in a turn
    units    scores: the elements of the largest tile of which a turn takes the exponential; weights: the codes in the
             largest integer tile loaded in a turn, 8 in an int32, or 1 if each code has a pointer of its own: whichever
             number of weights the turn multiplies; all tiles of that shape are counted
    figure   instructions of the loop · threads of the block / (turns · units)

A loop whose loads say no width (tensor memory accelerator) or whose turns do not come out whole has no figure.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .disassembly import Instruction

LOADS = r"tt\.load|ttg\.async_copy_global_to_local|amdg\.buffer_load|tt\.descriptor_load"
TILE = r"tensor<((?:\d+x)+)(?:!tt\.ptr<(\w+)>|(\w+)), (#.+?)>(?: loc|,| ->)"
Place = tuple[str, int]  # file, line


@dataclass(frozen=True)
class Load:
    """A tile loaded from global memory: its elements, their type, and how many of them a thread gets, if known."""

    place: Place
    shape: tuple[int, ...]
    dtype: str
    of_a_thread: int | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        return int("".join(filter(str.isdigit, self.dtype)))


@dataclass(frozen=True)
class Turn:
    """A loop of the source, or the whole kernel.

    loads           those of a turn
    exponentials    elements of the largest tile it exponentiates
    dots            elements of the left and right factors of each product of matrices; one may be cut up along k
    products        multiplications of single elements
    """

    loads: Sequence[Load]
    exponentials: int
    dots: Sequence[tuple[int, int]]
    products: int

    @property
    def codes(self) -> Sequence[Load]:
        """The loads of integer tiles of the shape of the largest: of 4-bit codes, if `weights` is not 0."""
        packed = [load for load in self.loads if load.dtype.startswith("i")]
        largest = max(packed, key=lambda load: load.elements, default=None)
        return [load for load in packed if largest and load.shape == largest.shape]

    @property
    def weights(self) -> int:
        """The 4-bit codes that a turn makes numbers of; 0 if none of its products has as many."""
        if not self.codes:
            return 0
        tiles, of_one = len(self.codes), self.codes[0]
        counts = (tiles * of_one.elements * of_one.bits // 4, tiles * of_one.elements)
        if not self.dots:  # each code is in a product or more
            return next((n for n in counts if n <= self.products), 0)
        factors = {sum(side) for side in zip(*self.dots)} | {tiles * n for dot in self.dots for n in dot}
        return next((n for n in counts if n in factors), 0)

    def of_weights(self, body: Sequence[Instruction]) -> tuple[list[Instruction], bool]:
        """The instructions of a loop that load codes, and whether no other load stands at the same source line."""
        places = {load.place for load in self.codes} if self.weights else set()
        alone = not places & {load.place for load in self.loads if load not in self.codes}
        return [x for x in body if x.loads and (x.file, x.line) in places], alone


def turns(ttgir: str) -> Iterator[Turn]:
    """Every loop of the kernel, and last the kernel itself."""
    rows = ttgir.splitlines()
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.+>)$", ttgir, re.M))
    places = locations(ttgir)
    for start, row in enumerate(rows):
        if opened := re.match(r"( *)(?:%\S+ = )?scf\.(?:for|while) ", row):
            end = next(i for i in range(start + 1, len(rows)) if rows[i].startswith(opened[1] + "}"))
            yield turn(rows[start + 1 : end], layouts, places)
    yield turn(rows, layouts, places)


def turn(rows: Sequence[str], layouts: dict[str, str], places: dict[str, Place]) -> Turn:
    loads, exponentials, dots, products = [], 0, [], 0
    for row in rows:
        if tile := re.search(r"= math\.exp2? .* : tensor<((?:\d+x)+)", row):
            exponentials = max(exponentials, elements(tile[1]))
        sizes = [elements(tile) for tile in re.findall(r"(?:tensor|memdesc)<((?:\d+x)+)", row)]
        if re.search(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ", row):
            dots.append((sizes[0], sizes[1]))
        if re.search(r"\b(arith\.mulf|math\.fma) ", row) and sizes:
            products += sizes[0]
        if re.search(rf"= (?:{LOADS}) ", row) and (tile := re.search(TILE, row)):
            shape = tuple(map(int, tile[1][:-1].split("x")))
            at = re.search(r"loc\((#\w+)\)$", row)
            place = places.get(at[1], ("", 0)) if at else ("", 0)
            loads.append(Load(place, shape, tile[2] or tile[3], elements_of_a_thread(shape, tile[4], layouts)))
    return Turn(loads, exponentials, dots, products)


def elements(shape: str) -> int:
    """Of a shape as MLIR writes it: 16x64x."""
    return math.prod(map(int, shape[:-1].split("x")))


def elements_of_a_thread(shape: Sequence[int], layout: str, layouts: dict[str, str]) -> int | None:
    """How many elements of a tile one thread holds in a blocked layout or a slice of one; else None."""
    if cut := re.fullmatch(r"#ttg\.slice<\{dim = (\d), parent = (#.+)\}>?", layout):
        parent = layouts.get(cut[2], cut[2])
        if not parent.startswith("#ttg.blocked"):
            return None
        dim = int(cut[1])
        spans = [axis for i, axis in enumerate(blocked(parent)) if i != dim]
    else:
        parent = layouts.get(layout, layout)
        if not parent.startswith("#ttg.blocked"):
            return None
        spans = blocked(parent)
    return math.prod(per * -(-n // (per * threads)) for n, (per, threads) in zip(shape, spans, strict=True))


def blocked(layout: str) -> list[tuple[int, int]]:
    """For each axis of a blocked layout: elements that lie together in a thread, threads along the axis."""
    per, threads, warps = (
        list(map(int, re.findall(r"\d+", found[1])))
        for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
        if (found := re.search(rf"{name} = \[(.+?)\]", layout))
    )
    return [(n, t * w) for n, t, w in zip(per, threads, warps, strict=True)]


def locations(ttgir: str) -> dict[str, Place]:
    """Names of places -> file and line. Of inlined code its own place, not the call's, as line tables have it."""
    found: dict[str, Place] = {}
    means = dict(re.findall(r"^(#loc\d*) = loc\((.+)\)$", ttgir, re.M))
    for name in means:
        end, seen = name, set()
        while end in means and end not in seen:
            seen.add(end)
            text = means[end]
            if place := re.match(r'"(.+?)":(\d+):', text):
                found[name] = place[1], int(place[2])
                break
            inner = re.search(r"#loc\d*", text)
            end = inner[0] if inner else ""
    return found


def count(ttgir: str, body: Sequence[Instruction], whole: bool = False) -> tuple[int, Turn] | None:
    """How many turns of which loop of the source a loop of the assembly does; None if it cannot be told. `whole`: the
    assembly has no loop; if neither has the source, that is one turn.
    """
    found = list(turns(ttgir))
    if whole and len(found) == 1:
        return 1, found[0]
    moved: Counter[Place] = Counter()
    for x in body:
        if x.loads:
            moved[x.file, x.line] += x.width
    best = max(found, key=lambda turn: overlap(turn, moved))
    unknown = {load.place for load in best.loads if load.of_a_thread is None}
    given: Counter[Place] = Counter()
    for load in best.loads:
        if load.of_a_thread is not None and load.place not in unknown:
            given[load.place] += load.of_a_thread * load.bits // 8
    if not given:
        return None
    largest = max(given, key=lambda place: given[place])
    number, rest = divmod(moved[largest], given[largest])
    return None if rest or not number else (number, best)


def overlap(turn: Turn, moved: Counter[Place]) -> float:
    """The share of places that the loads of a turn and of a loop have in common."""
    places = {load.place for load in turn.loads}
    return len(places & moved.keys()) / max(1, len(places | moved.keys()))
