"""The coverage of a config's tiles by the sizes of the calls that were checked, as `check` prints it.

The name of a block tells which axis it divides: BLOCK_M rows, BLOCK_N columns or keys, BLOCK_K the sum of a product,
BLOCK_H and BLOCK_G heads, BLOCK a row. Lengths are those drawn: a sequence may be shorter than `t`, and a kernel may
use a smaller block than its config names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Axis = tuple[str, int]  # the name of an axis that a block divides, and its length


def cut_axis(block: str, sizes: Mapping[str, Any]) -> Axis | None:
    """The axis that a block of this name divides at these sizes; None if that is not known."""
    rows, groups = sizes.get("s", 1) * sizes.get("ratio", 1), sizes.get("g", 0) * sizes.get("ratio", 1)
    depth = sizes.get("G", 0) * sizes.get("group", 0)
    candidates = {
        "BLOCK_M": [("m", sizes.get("m")), ("rows of queries", rows)],
        "BLOCK_N": [("n", sizes.get("n")), ("keys, at most", sizes.get("t")), ("keys", sizes.get("s"))],
        "BLOCK_K": [("k", sizes.get("k")), ("k", depth)],
        "BLOCK_H": [("heads", sizes.get("h")), ("heads", groups)],
        "BLOCK_G": [("heads", sizes.get("g"))],
        "BLOCK": [("e", sizes.get("e")), ("f", sizes.get("f"))],
    }
    return next(((name, length) for name, length in candidates.get(block, []) if length is not None), None)


def coverage_lines(config: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each block of a config: the number of tiles in the calls, and a case that none of them covered."""
    for block in (name for name in config if name.startswith("BLOCK")):
        axes = [axis for sizes in calls if (axis := cut_axis(block, sizes))]
        if not axes:
            yield f"{block}: what it cuts is not known here"
            continue
        size, lengths = config[block], [length for _, length in axes]
        tiles = [-(-length // size) for length in lengths]
        span = f"{min(tiles)}" if min(tiles) == max(tiles) else f"{min(tiles)}–{max(tiles)}"
        prefix = f"{axes[0][0]}: {span} tile{'s' * (max(tiles) > 1)} of {size}"
        if max(tiles) < 2:
            yield f"{prefix}, NEVER MORE THAN ONE"
        elif any(length > size and length % size for length in lengths):
            yield f"{prefix}, last tile partial"
        else:
            yield f"{prefix}, the last never partial"
