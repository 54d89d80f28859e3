"""The tiles that launches cut the axes of a call into, the sizes at their edges, and what calls covered of both.

The name of a constant tells which axis it divides: BLOCK_M rows, BLOCK_N columns or keys, BLOCK_K the sum of a product,
BLOCK_H and BLOCK_G heads, BLOCK a row, MIN_KEYS and MAX_KEYS keys of a split, BLOCK_S splits that are merged at a time,
SPLIT_K splits of k, GROUP_M row tiles that share columns, ROWS rows that a program sums, PARTS such sums that are added
at a time, COLUMNS of them. Constants are those of the config and those that kernels were launched with, which may be
smaller. Lengths are those drawn: a sequence may be shorter than `t`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

Constants = Mapping[str, int]  # of one launch, by name
Sizes = Mapping[str, Any]

# The name of an axis, and the sizes whose product is its length, the growing one first. The first that exist count.
AXES: Sequence[tuple[str, tuple[str, ...]]] = (
    ("m", ("m",)),
    ("n", ("n",)),
    ("k", ("k",)),
    ("k", ("G", "group")),
    ("e", ("e",)),
    ("f", ("f",)),
    ("rows", ("rows",)),
    ("rows of queries", ("s", "ratio")),
    ("rows of queries", ("s",)),
    ("keys", ("t",)),
    ("new keys", ("s",)),
    ("heads", ("h",)),
    ("heads", ("g", "ratio")),
    ("KV heads", ("g",)),
)
DIVIDED_AXES: Mapping[str, tuple[str, ...]] = {
    "BLOCK_M": ("m", "rows of queries"),
    "BLOCK_N": ("n", "keys", "new keys"),
    "BLOCK_K": ("k",),
    "BLOCK_H": ("heads", "KV heads"),
    "BLOCK_G": ("KV heads",),
    "BLOCK": ("e", "f", "n"),
    "ROWS": ("rows",),
    "PARTS": ("rows",),
    "COLUMNS": ("e",),
    "SPLIT_K": ("k",),
    "GROUP_M": ("m",),
    "MIN_KEYS": ("keys",),
    "MAX_KEYS": ("keys",),
    "BLOCK_S": ("keys",),
}
# Constants that count blocks.
COUNTED_IN = {"SPLIT_K": "BLOCK_K", "GROUP_M": "BLOCK_M", "BLOCK_S": "MIN_KEYS", "PARTS": "ROWS"}
NO_TILES = ("PROGRAMS_PER_SM",)  # constants of configs that cut no axis
MOST_TILES = 3  # whose edges are sought


@contextmanager
def recorded_launches() -> Iterator[list[Constants]]:
    """Inside, the list receives the integer constants of every kernel that is launched."""
    launches: list[Constants] = []

    def record(run: Any) -> Any:
        def recording_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            launches.append({k: v for k, v in kwargs.items() if type(v) is int and k.isupper()})
            return run(self, *args, **kwargs)

        return recording_run

    with (
        patch.object(InterpretedFunction, "run", record(InterpretedFunction.run)),
        patch.object(JITFunction, "run", record(JITFunction.run)),
    ):
        yield launches


@dataclass(frozen=True)
class Edge:
    """Sizes at which an axis is a whole number of blocks (offset 0), as little as possible less (-1) or more (1)."""

    axis: str
    block: int
    tiles: int
    offset: int

    def value(self, sizes: Sizes) -> int:
        """The value of the axis' growing size (see `AXES`) that is at this edge beside the other sizes."""
        growing = growing_size(self.axis, sizes)
        assert growing, f"no axis {self.axis} at {sizes}"
        step, length = growing[1], self.tiles * self.block
        return {-1: -(-length // step) - 1, 0: -(-length // step), 1: length // step + 1}[self.offset]


def edges(axis: str, block: int) -> list[Edge]:
    """The edges that are sought for a block, simple ones first."""
    return [Edge(axis, block, tiles, offset) for tiles in range(1, MOST_TILES + 1) for offset in (1, 0, -1)]


@dataclass(frozen=True)
class Tiling:
    """An axis of one call that is cut into blocks; its length grows by `step` with one more of `size`."""

    constant: str
    axis: str
    block: int
    length: int
    size: str
    step: int

    @property
    def tiles(self) -> int:
        return -(-self.length // self.block)

    def edges(self) -> Iterator[Edge]:
        """The edges that this length is at."""
        whole, rest = divmod(self.length, self.block)
        if rest == 0:
            yield Edge(self.axis, self.block, whole, 0)
        else:
            if whole and rest <= self.step:
                yield Edge(self.axis, self.block, whole, 1)
            if self.block - rest <= self.step:
                yield Edge(self.axis, self.block, whole + 1, -1)


def growing_size(axis: str, sizes: Sizes) -> tuple[str, int] | None:
    """The size that the length of an axis grows with, and by how much; None if these sizes have no such axis."""
    for name, (size, *others) in AXES:
        if name == axis and all(x in sizes for x in (size, *others)):
            return size, math.prod(sizes[x] for x in others)
    return None


def tilings(constants: Constants, sizes: Sizes) -> list[Tiling]:
    """The tilings of a launch with these constants in a call of these sizes."""
    result = []
    for name in constants.keys() & DIVIDED_AXES.keys():
        block = constants[name] * constants.get(COUNTED_IN.get(name, ""), 1)
        for axis in DIVIDED_AXES[name]:
            if growing := growing_size(axis, sizes):
                size, step = growing
                result.append(Tiling(name, axis, block, sizes[size] * step, size, step))
    return sorted(result, key=lambda x: (x.constant, x.axis, x.block))


def launch_tilings(config: Mapping[str, Any], launches: Sequence[Constants], sizes: Sizes) -> list[Tiling]:
    """The tilings of a call: those of its launches, each with the constants of the config that it does not replace."""
    own = {name: value for name, value in config.items() if type(value) is int}
    return list(dict.fromkeys(x for launch in launches or [{}] for x in tilings({**own, **launch}, sizes)))


@dataclass
class TileCoverage:
    """The tiles that checked calls covered.

    edges    the edges that lengths were at
    tiles    by constant and axis the blocks, and the numbers of tiles there were; negative: the last one partial
    """

    edges: set[Edge] = field(default_factory=set)
    tiles: dict[tuple[str, str], dict[int, set[int]]] = field(default_factory=dict)

    def add(self, call: Sequence[Tiling]) -> None:
        for x in call:
            self.edges.update(x.edges())
            counts = self.tiles.setdefault((x.constant, x.axis), {}).setdefault(x.block, set())
            counts.add(-x.tiles if x.length % x.block else x.tiles)

    def lines(self, config: Mapping[str, Any]) -> Iterator[str]:
        """A line for each constant and axis: its numbers of tiles, and what no call covered; and the count of edges."""
        for name in config:
            if name.isupper() and name not in (*NO_TILES, *(constant for constant, _ in self.tiles)):
                yield f"{name}: what it cuts is not known here"
        for (constant, axis), blocks in sorted(self.tiles.items()):
            counts = {n for x in blocks.values() for n in x}
            least, most = min(map(abs, counts)), max(map(abs, counts))
            span = f"{least}" if least == most else f"{least}–{most}"
            text = f"{axis}: {span} tile{'s' * (most > 1)} of {' or '.join(map(str, sorted(blocks)))} ({constant})"
            if most < 2:
                yield f"{text}, NEVER MORE THAN ONE"
            elif any(n < -1 for n in counts):
                yield f"{text}, last tile partial"
            else:
                yield f"{text}, THE LAST NEVER PARTIAL"
        if wanted := {x for (_, axis), blocks in self.tiles.items() for block in blocks for x in edges(axis, block)}:
            yield f"edges of tiles: {len(wanted & self.edges)} of {len(wanted)}"
