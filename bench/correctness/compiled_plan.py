"""The examples at which a config is checked as compiled, few enough that compiling them all takes minutes.

A kernel is compiled anew for each dtype, and for arguments that are aligned or not: in the layout of production for
sizes that are multiples of 16 and for ragged ones, and at odd strides. `examples` gives one or two calls for each dtype
and layout, with as many tiles along each axis as its loops need to be in full swing; the other choices are such that
many pairs meet. `variations` gives more calls of the same compiled code, to enter the blocks that no call has entered.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from vila_triton.registry import IntRange, OneOf, Op

from .covering_array import Row, complete_row, uncovered_pairs
from .guarded_memory import MEMORY_LAYOUTS
from .tiles import Tiling, launch_tilings

UNIT = 16  # Triton compiles another kernel where an integer is a multiple of it, and where it is 1
MAX_FLOPS, MAX_BYTES = 6 * 10**7, 2**23  # of one call
SUMMED = ("k", "keys", "new keys")  # axes that the loop of a kernel runs along
SIZES = ("whole", "ragged")  # multiples of UNIT, though not of tiles; whatever else

Sizes = dict[str, Any]


def examples(op: Op, config: Mapping[str, Any], number: int) -> Iterator[tuple[Row, str]]:
    """Choices of each dtype in each layout, and the class of sizes to take with them."""
    axes = choice_axes(op)
    left, rng = uncovered_pairs(axes), random.Random(f"{op.name} {number}")
    for dtype, layout in product(axes["dtype"], MEMORY_LAYOUTS):
        row = complete_row(axes, {"dtype": dtype, "layout": layout}, left, rng)
        assert row
        for sizes in SIZES if layout == "aligned" else SIZES[1:]:
            yield row, sizes


def other_choices(op: Op, row: Row, seed: int) -> Row:
    """Other choices for the same dtype and layout, at random."""
    rng, axes = random.Random(f"{op.name} {seed}"), choice_axes(op)
    return {name: row[name] if name in ("dtype", "layout") else rng.choice(axes[name]) for name in axes}


def choice_axes(op: Op) -> dict[str, Sequence[Any]]:
    """All that is chosen beside sizes, with the memory layout and the kind of values."""
    choices = {name: axis.values for name, axis in op.domain.items() if isinstance(axis, OneOf)}
    return {**choices, "values": ("random", *op.hard_cases), "layout": MEMORY_LAYOUTS}


def draw_sizes(op: Op, config: Mapping[str, Any], row: Row, sizes: str, seed: int) -> Sizes:
    """Sizes of a class, with the choices of a row, "values" unless random, and a "seed"."""
    rng = random.Random(f"{op.name} {seed} {sizes}")
    lowest = {name: axis.low if isinstance(axis, IntRange) else row[name] for name, axis in op.domain.items()}
    cut = tilings_by_size(op, config, lowest)
    drawn, tiles = dict(lowest), {name: most_tiles(own, config) for name, own in cut.items()}
    for name, axis in op.domain.items():
        if isinstance(axis, IntRange) and name not in cut:
            size = rng.randint(axis.low, axis.high)
            drawn[name] = min(size, 3) if sizes == "ragged" or axis.high < UNIT else round_up(size, UNIT)
    while True:
        for name, own in cut.items():
            drawn[name] = lowest[name] + (length_of(own, tiles[name], sizes, rng) - lowest[name])
        flops, size = op.cost(**{name: drawn[name] for name in op.domain})
        shrinkable = [name for name in tiles if tiles[name] > 1]
        if (flops <= MAX_FLOPS and size <= MAX_BYTES) or not shrinkable:
            break
        name = max(shrinkable, key=lambda name: (cut[name][0].axis not in SUMMED, tiles[name]))
        tiles[name] -= 1
    drawn["seed"] = seed
    return drawn | ({"values": row["values"]} if row["values"] != "random" else {})


def tilings_by_size(op: Op, config: Mapping[str, Any], sizes: Sizes) -> dict[str, list[Tiling]]:
    """The tilings of a config by the size that grows with them. Groups of tiles are no tiles."""
    found: dict[str, list[Tiling]] = {}
    for tiling in launch_tilings(config, (), sizes):
        if tiling.constant != "GROUP_M" and isinstance(op.domain.get(tiling.size), IntRange):
            found.setdefault(tiling.size, []).append(tiling)
    return found


def most_tiles(own: list[Tiling], config: Mapping[str, Any]) -> int:
    """As many tiles as fill the pipeline of a loop and one more; of an axis without a loop, two."""
    return 2 + (config.get("num_stages", 1) if any(x.axis in SUMMED for x in own) else 0)


def length_of(own: list[Tiling], tiles: int, sizes: str, rng: random.Random) -> int:
    """The value of a size at which the last of so many of its smallest tiles, or of two of its largest, is ragged."""
    small, large = min(own, key=lambda x: x.block), max(own, key=lambda x: x.block)
    length = max(small.block * tiles, large.block + small.block if large is not small else 0)
    if sizes == "whole":
        if small.step % UNIT == 0:
            return -(-length // small.step)
        return round_up(-(-length // small.step), UNIT) - (UNIT if small.block > UNIT else 0)
    return max(1, (length - rng.choice((1, small.block // 2 + 1, small.block - 1))) // small.step) | 1


def round_up(size: int, unit: int) -> int:
    """The lowest multiple of the unit that is no less."""
    return -(-size // unit) * unit


def variations(op: Op, config: Mapping[str, Any], sizes: Sizes) -> Iterator[tuple[str, Sizes]]:
    """Calls of the code that was compiled for these sizes, mostly: other values, then one size or all of them changed.

    Yields what was changed in words, and the sizes.
    """
    for values in ("random", *op.hard_cases):
        if values != sizes.get("values", "random"):
            yield values, {**sizes, "values": values} if values != "random" else without(sizes, "values")
    ranges = {name: axis for name, axis in op.domain.items() if isinstance(axis, IntRange)}
    cut = tilings_by_size(op, config, sizes)
    small = {name: same_class(axis.low, sizes[name], axis.low) for name, axis in ranges.items()}
    yield "all sizes", {**sizes, **small}
    for name, axis in ranges.items():
        blocks = [x.block // x.step for x in cut.get(name, ())] or [axis.high]
        lengths = {small[name], *(same_class(t * b, sizes[name], axis.low) for b in blocks for t in (1, 2, 4))}
        for length in sorted(lengths - {sizes[name]}):
            changed = {**sizes, name: length}
            if op.cost(**{x: changed[x] for x in op.domain})[0] <= MAX_FLOPS:
                yield name, changed


def same_class(size: int, like: int, low: int) -> int:
    """The smallest number from `size` on that Triton specializes as it does `like`."""
    if like == 1:
        return 1
    start = max(size, low, 2)
    return next(n for n in range(start, start + 2 * UNIT) if (n % UNIT == 0) == (like % UNIT == 0))


def without(sizes: Sizes, name: str) -> Sizes:
    """The sizes but for one."""
    return {key: value for key, value in sizes.items() if key != name}
