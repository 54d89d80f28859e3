"""A choice of an implementation: its name, or names for ranges of a size that differs from call to call.

    [[4, "gemv"], [64, "splitk"], "prefill"]

is "gemv" up to size 4, "splitk" up to 64, "prefill" beyond. The size is the first that the op names as varying.
"""

from bisect import bisect_left
from collections.abc import Sequence
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
        """The ranges of one name in words; `size` is what the size is called."""
        descriptions = []
        for i in (i for i, other in enumerate(self.names) if other == name):
            first, last = self.ends[i - 1] + 1 if i else None, self.ends[i] if i < len(self.ends) else None
            bounded = f"{size_name} {first}" if first == last else f"{size_name} {first} to {last}"
            descriptions.append(
                f"{size_name} up to {last}"
                if first is None
                else f"{size_name} from {first}"
                if last is None
                else bounded
            )
        return ", ".join(descriptions)


Choice = str | ChoiceBySize


def implementation_at(choice: Choice, size: int) -> str:
    return choice if isinstance(choice, str) else choice.lookup(size)


def merge_ranges(pieces: Sequence[tuple[int, str]], last_name: str) -> Choice:
    """The choice of pieces (last size, name) and what runs beyond them; neighbours of one name become one range."""
    changes = [(end, name) for (end, name), (_, next_name) in pairwise([*pieces, (0, last_name)]) if name != next_name]
    return (
        ChoiceBySize(tuple(end for end, _ in changes), (*(name for _, name in changes), last_name))
        if changes
        else last_name
    )


@dataclass(frozen=True)
class BoundedChoice:
    """A choice that holds for sizes from `first` to `last`, both included."""

    first: int
    last: int
    choice: Choice

    def with_fallback(self, fallback: Choice) -> Choice:
        """This choice for the sizes it holds for, `outside` for all others."""

        def choose(size: int) -> str:
            return implementation_at(self.choice if self.first <= size <= self.last else fallback, size)

        all_ends = (choice.ends for choice in (self.choice, fallback) if isinstance(choice, ChoiceBySize))
        ends = sorted({self.first - 1, self.last}.union(*all_ends) - {-1})
        return merge_ranges([(end, choose(end)) for end in ends], choose(ends[-1] + 1))


def parse_choice(value: Any) -> Choice:
    """A choice as it stands in a file. Errors: ValueError with what is wrong and what was expected."""
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
    """The implementations that a choice names."""
    return (choice,) if isinstance(choice, str) else choice.names
