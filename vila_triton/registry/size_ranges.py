"""The choice of an implementation: one name, or names for ranges of a size that differs from call to call.

    [[4, "gemv"], [64, "splitk"], "prefill"]

chooses "gemv" up to size 4, "splitk" up to 64, "prefill" beyond. The size is the first of the op's `dynamic_sizes`.
"""

import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class ChoiceBySize:
    """Names of implementations by size; a range begins after the end of the one before it, the last has no end."""

    ends: tuple[int, ...]  # increasing
    names: tuple[str, ...]  # one more than ends

    def lookup(self, size: int) -> str:
        return self.names[bisect_left(self.ends, size)]

    def describe(self, name: str, size_name: str) -> str:
        """Describe the ranges of one name: "m up to 4, m from 65"."""
        descriptions = []
        for first, last, other in zip([None, *(end + 1 for end in self.ends)], [*self.ends, None], self.names):
            if other != name:
                continue
            if first is None:
                descriptions.append(f"{size_name} up to {last}")
            elif last is None:
                descriptions.append(f"{size_name} from {first}")
            else:
                descriptions.append(f"{size_name} {first}" + (f" to {last}" if last > first else ""))
        return ", ".join(descriptions)


Choice = str | ChoiceBySize


def implementation_at(choice: Choice, size: int) -> str:
    """Return the name of the implementation that is chosen at a size."""
    return choice if isinstance(choice, str) else choice.lookup(size)


def merge_ranges(pieces: Sequence[tuple[int, str]], last_name: str) -> Choice:
    """The choice of pieces (last size, name) and of `last_name` beyond them; neighbors of one name become one range."""
    kept = [(end, name) for (end, name), (_, next_name) in pairwise([*pieces, (0, last_name)]) if name != next_name]
    if not kept:
        return last_name
    return ChoiceBySize(tuple(end for end, _ in kept), (*(name for _, name in kept), last_name))


@dataclass(frozen=True)
class BoundedChoice:
    """A choice that holds for sizes from `first` to `last`, both included."""

    first: int
    last: int
    choice: Choice

    def with_fallback(self, fallback: Choice) -> Choice:
        """This choice for the sizes it holds for, `fallback` for all others."""

        def choose(size: int) -> str:
            return implementation_at(self.choice if self.first <= size <= self.last else fallback, size)

        all_ends = (choice.ends for choice in (self.choice, fallback) if isinstance(choice, ChoiceBySize))
        ends = sorted({self.first - 1, self.last}.union(*all_ends) - {-1})
        return merge_ranges([(end, choose(end)) for end in ends], choose(ends[-1] + 1))


def parse_choice(value: Any) -> Choice:
    """Parse a choice as files hold it. Raises ValueError with the fault and what was expected."""
    if isinstance(value, str | ChoiceBySize):
        return value
    ranges = value if isinstance(value, Sequence) and value else [value]
    *bounded_ranges, last_name = ranges
    for pair in bounded_ranges:
        if not (isinstance(pair, Sequence) and [type(x) for x in pair] == [int, str]):
            raise ValueError(f'{pair!r} is no range, expected [last size, "name"]')
    if not isinstance(last_name, str):
        raise ValueError(f"{last_name!r} is at the end, expected the name of what runs beyond the last range")
    ends = tuple(pair[0] for pair in bounded_ranges)
    if any(a >= b for a, b in zip((-1, *ends), ends)):
        raise ValueError(f"the ranges end at {', '.join(map(str, ends))}, expected increasing sizes")
    return ChoiceBySize(ends, (*(pair[1] for pair in bounded_ranges), last_name)) if bounded_ranges else last_name


def implementation_names(choice: Choice) -> tuple[str, ...]:
    """The names of the implementations of a choice."""
    return (choice,) if isinstance(choice, str) else choice.names


def rename_implementations(choice: Choice, new_names: Mapping[str, str]) -> Choice:
    """The choice with current names in place of old ones; each gives a note on standard error."""
    for old in new_names.keys() & set(implementation_names(choice)):
        print(f"implementation {old!r} is now called {new_names[old]!r}", file=sys.stderr)
    if isinstance(choice, str):
        return new_names.get(choice, choice)
    return ChoiceBySize(choice.ends, tuple(new_names.get(name, name) for name in choice.names))
