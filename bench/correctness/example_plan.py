"""The examples that an implementation is checked at, drawn from the domain of its op and from its config together.

The first is the simplest. Then come, in turn,

- rows of a covering array: as far as the bound of work allows, every two values of different axes meet, among them the
  memory layout, the kind of values (random, or one of the op's hard cases), and for each size its class: the lowest,
  one inside the domain, one at the edge of a tile, one far outside the domain;
- examples at the edges of tiles that no call has been at: j blocks, as little as possible less and as little as
  possible more, for j = 1 to 3. Blocks are those of the config and those that earlier examples launched kernels with.

and in the end rows at random, half of them near a call that was served. All are the same each time. Sizes are within a
bound of work, so that an interpreted call takes a fraction of a second.
"""

import math
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from vila_triton.registry import IntRange, OneOf, Op, Unsupported

from .covering_array import pairwise_rows
from .error_budget import UNSUPPORTED_DTYPES, Example, shared_example
from .guarded_memory import MEMORY_LAYOUTS, MemoryLayout
from .tiles import Constants, Edge, TileCoverage, edges, growing_size, launch_tilings

MAX_FLOPS, MAX_BYTES = 5 * 10**7, 2**22  # of one call
MAX_STEPS = 48  # a step is a tile, or a row that is not cut; twice as many where an edge is sought
STEP_ELEMENTS = 2**18  # a tile of so many takes as long as two steps
INSIDE_HEADS = ("r",)  # sizes that take no steps of their own
FAR = 8  # times the domain's upper bound, or the largest block
SIZE_CLASSES = ("lowest", "inside", "edge", "far")
ATTEMPTS = 2  # at an edge

Sizes = dict[str, Any]


class ExamplePlan:
    """Endless examples for one config: sizes with their "seed", and "values" unless random; and a memory layout.

    `observe` tells the plan what a call launched. Other seeds give other examples. covered: edges that need no more.
    """

    def __init__(self, op: Op, config: Mapping[str, Any], seed: int = 0, covered: TileCoverage | None = None):
        self.op, self.config, self.seed = op, config, seed
        self.rng = random.Random(f"{op.name} {seed}")
        self.ranges = {name: axis for name, axis in op.domain.items() if isinstance(axis, IntRange)}
        self.lowest = {name: axis.low for name, axis in self.ranges.items()}
        self.choices: dict[str, Sequence[Any]] = {
            name: [x for x in axis.values if x not in UNSUPPORTED_DTYPES]
            for name, axis in op.domain.items()
            if isinstance(axis, OneOf)
        }
        self.choices |= {"values": ("random", *op.hard_cases), "layout": MEMORY_LAYOUTS}
        self.coverage = covered or TileCoverage()
        self.contexts: dict[Edge, Sizes] = {}  # the sizes of the latest call that launched a kernel with such blocks
        self.attempts: dict[Edge, int] = {}
        self.served: set[tuple[str, Any]] = set()  # sizes and values that were in a call
        self.latest: Sizes = {}  # those of the latest call
        self.refusals: Counter[tuple[str, Any]] = Counter()

    def __iter__(self) -> Iterator[tuple[Sizes, MemoryLayout]]:
        yield self.finish({name: values[0] for name, values in self.choices.items()}, {}, seed=0)
        axes = {**self.choices, **{name: SIZE_CLASSES for name in self.ranges}}
        rows = pairwise_rows(axes, self.seed, self.is_supported)
        while True:
            if row := next(rows, None):
                yield self.at_row(row)
            if edge := self.next_edge():
                yield self.at_edge(edge)
            elif row is None:
                yield self.at_row(self.random_row(axes))

    def observe(self, sizes: Sizes, launches: Sequence[Constants]) -> None:
        """Take into account what a call of these sizes launched."""
        call = launch_tilings(self.config, launches, sizes)
        self.coverage.add(call)
        self.contexts |= {edge: sizes for x in call for edge in edges(x.axis, x.block)}
        self.served.update(sizes.items())
        self.latest = sizes

    def refuse(self, sizes: Sizes) -> None:
        """Take into account that the implementation does not support an example of these sizes."""
        self.refusals.update(sizes.items())

    def is_supported(self, row: Mapping[str, Any]) -> bool:
        """False for a row with a value that was refused more than once and never served, once others were served."""
        return not self.served or not any(self.refusals[x] > 1 and x not in self.served for x in row.items())

    def random_row(self, axes: Mapping[str, Sequence[Any]]) -> Sizes:
        """A row at random; every other one like the latest call in most choices, for where little is supported."""
        row = {name: self.rng.choice(values) for name, values in axes.items()}
        if self.rng.random() < 0.5:
            kept = self.choices.keys() & self.latest.keys() - {"values"}
            row |= {name: self.latest[name] for name in sorted(kept) if self.rng.random() < 0.75}
        return row

    def next_edge(self) -> Edge | None:
        """The edge to be at next, None if all were tried enough: of those tried least, the ones just past the first
        tile of a block, so that the largest blocks do not wait for all edges of the others; then by length.
        """

        def rank(edge: Edge) -> tuple:
            past_first = (edge.tiles, edge.offset) == (1, 1)
            return (
                self.attempts.get(edge, 0),
                not past_first,
                edge.tiles * edge.block,
                -edge.offset,
                edge.axis,
                edge.block,
            )

        uncovered = self.contexts.keys() - self.coverage.edges
        return min((x for x in uncovered if self.attempts.get(x, 0) < ATTEMPTS), default=None, key=rank)

    def at_edge(self, edge: Edge) -> tuple[Sizes, MemoryLayout]:
        """An example at an edge, where that fits the bound of work, and by chance at edges of other axes."""
        self.attempts[edge] = self.attempts.get(edge, 0) + 1
        choices = {name: self.rng.choice(values) for name, values in self.choices.items()}
        if self.attempts[edge] == 1:  # the constants that were observed there are surest where they were observed
            choices |= {name: x for name, x in self.contexts[edge].items() if name in self.choices and name != "values"}
        if self.rng.random() < 0.5:
            choices["values"] = "random"
        size = self.size_of(edge, choices)
        others = {name: self.draw(name, self.rng.choice(SIZE_CLASSES[:3]), choices) for name in self.ranges}
        return self.finish(choices, {**others, size: edge.value({**choices, **others})}, last=(size,))

    def at_row(self, row: Mapping[str, Any]) -> tuple[Sizes, MemoryLayout]:
        """An example of a row of the covering array."""
        choices = {name: row[name] for name in self.choices}
        sizes = {name: self.draw(name, row[name], choices) for name in self.ranges}
        return self.finish(choices, sizes, last=[name for name in self.ranges if row[name] in ("edge", "far")])

    def draw(self, name: str, size_class: str, choices: Mapping[str, Any]) -> int:
        """A size of a class; one inside the domain if no tile of this axis is known."""
        axis = self.ranges[name]
        if size_class == "lowest":
            return axis.low
        if size_class == "far":
            own = [x for x in self.contexts if x.tiles == 1 and self.size_of(x, choices) == name]
            blocks = [x.value({**choices, **self.lowest}) for x in own]
            powers = range(axis.high.bit_length(), (FAR * max([axis.high, *blocks])).bit_length())
            return 2 ** self.rng.choice(powers) + self.rng.choice((-1, 0, 1))
        at_edges = [x for x in self.contexts if size_class == "edge" and self.size_of(x, choices) == name]
        if at_edges:
            uncovered = [x for x in at_edges if x not in self.coverage.edges]
            return self.rng.choice(uncovered or at_edges).value({**choices, **self.lowest})
        return self.inside(name)

    def size_of(self, edge: Edge, choices: Mapping[str, Any]) -> str:
        """The size that the axis of an edge grows with."""
        growing = growing_size(edge.axis, {**choices, **self.lowest})
        assert growing, f"{self.op.name} has no axis {edge.axis}"
        return growing[0]

    def finish(
        self, choices: Mapping[str, Any], sizes: Mapping[str, int], last: Collection[str] = (), seed: int | None = None
    ) -> tuple[Sizes, MemoryLayout]:
        """Round sizes to steps of their ranges, and lower them until the work is within its bound, `last` after all."""
        fitted: Sizes = {name: choices.get(name) for name in self.op.domain}
        for name, axis in self.ranges.items():
            fitted[name] = axis.low + max(0, sizes.get(name, axis.low) - axis.low) // axis.step * axis.step
        names = self.rng.sample(list(self.ranges), len(self.ranges))
        groups = [name for name in names if name not in last], [name for name in names if name in last]
        lower = [
            step
            for group in groups
            for step in (
                *((name, min(fitted[name], self.inside(name))) for name in group),
                *((name, self.lowest[name]) for name in group),
            )
        ]
        for name, value in lower:
            if self.is_affordable(fitted, MAX_STEPS * (1 + bool(last))):
                break
            fitted[name] = value
        fitted["seed"] = self.rng.randrange(2**16) if seed is None else seed
        if choices["values"] != "random":
            fitted["values"] = choices["values"]
        return fitted, choices["layout"]

    def inside(self, name: str) -> int:
        axis = self.ranges[name]
        return self.rng.randrange(axis.low, axis.high + 1, axis.step)

    def is_affordable(self, sizes: Sizes, max_steps: int) -> bool:
        """True if a call of these sizes is within the bound of work."""
        flops, size = self.op.cost(**{name: sizes[name] for name in self.op.domain})
        cut = {x.axis: x for x in launch_tilings(self.config, (), sizes) if x.constant.startswith(("BLOCK", "ROWS"))}
        uncut = self.ranges.keys() - {x.size for x in cut.values()} - set(INSIDE_HEADS)
        steps = math.prod(max(1, x.tiles) for x in cut.values()) * math.prod(sizes[name] for name in uncut)
        elements = math.prod({x.constant: x.block for x in cut.values()}.values())
        return flops <= MAX_FLOPS and size <= MAX_BYTES and steps * (1 + elements / STEP_ELEMENTS) <= max_steps


def planned_example(op: Op, sizes: Mapping[str, Any]) -> Example:
    """The example of sizes from a plan. Errors: Unsupported if the op refuses sizes outside its domain."""
    outside = {name: x for name, x in sizes.items() if name in op.domain and x not in op.domain[name]}
    try:
        example = shared_example(op, **sizes)
        if outside:
            op.check(*example.args)
    except (TypeError, ValueError) as error:
        if outside:
            raise Unsupported(f"{op.name} refuses sizes outside its domain: {error}") from error
        raise
    return example
