"""Covering arrays: few rows in which every two values of different axes meet (Cohen et al. 1997, AETG)."""

import random
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
Pair = tuple[str, Hashable, str, Hashable]


def pairs_of(row: Mapping[str, Hashable]) -> Iterator[Pair]:
    """Every two values of a row, with the names of their axes."""
    for (a, x), (b, y) in combinations(row.items(), 2):
        yield a, x, b, y


def pairwise_rows(
    axes: Mapping[str, Sequence[Hashable]], seed: int = 0, is_valid: Callable[[Row], bool] = lambda row: True
) -> Iterator[Row]:
    """Rows of one value an axis, the same each time, until every two values of different axes have been in a row.

    is_valid: called with rows of some of the axes too; no row holds what it refuses. Pairs that no valid row holds are
    left out.
    """
    rng = random.Random(seed)
    left = uncovered_pairs(axes)
    order = sorted(left, key=repr)
    rng.shuffle(order)
    for pair in order:
        if pair not in left:
            continue
        left.discard(pair)
        row = {pair[0]: pair[1], pair[2]: pair[3]}
        if is_valid(row) and (whole := complete_row(axes, row, left, rng, is_valid)):
            yield whole


def uncovered_pairs(axes: Mapping[str, Collection[Hashable]]) -> set[Pair]:
    """All pairs of values of different axes."""
    return {(a, x, b, y) for (a, xs), (b, ys) in combinations(axes.items(), 2) for x in xs for y in ys}


def complete_row(
    axes: Mapping[str, Collection[Hashable]],
    row: Row,
    left: set[Pair],
    rng: random.Random,
    is_valid: Callable[[Row], bool] = lambda row: True,
) -> Row | None:
    """The row with values of the other axes that make most of the pairs that are left, which it removes from them; None
    if no row is valid.
    """
    row = dict(row)
    others = [name for name in axes if name not in row]
    rng.shuffle(others)
    for name in others:
        fitting = [x for x in axes[name] if is_valid({**row, name: x})]
        if not fitting:
            return None
        gain = {x: sum((p in left) for p in pairs_with(axes, row, name, x)) for x in fitting}
        row[name] = rng.choice([x for x in fitting if gain[x] == max(gain.values())])
    row = {name: row[name] for name in axes}
    left.difference_update(pairs_of(row))
    return row


def pairs_with(axes: Mapping[str, Any], row: Row, name: str, value: Hashable) -> Iterator[Pair]:
    """The pairs of a value with those of a row, axes in their order."""
    order = list(axes)
    for other, x in row.items():
        if order.index(other) < order.index(name):
            yield other, x, name, value
        else:
            yield name, value, other, x
