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
class Ranges:
    """Names of implementations by size; a range begins after the end of the one before it, the last has no end."""

    ends: tuple[int, ...]  # increasing
    names: tuple[str, ...]  # one more than ends

    def at(self, size: int) -> str:
        return self.names[bisect_left(self.ends, size)]

    def where(self, name: str, size: str) -> str:
        """The ranges of one name in words; `size` is what the size is called."""
        words = []
        for i in (i for i, other in enumerate(self.names) if other == name):
            first, last = self.ends[i - 1] + 1 if i else None, self.ends[i] if i < len(self.ends) else None
            exactly = f"{size} {first}" if first == last else f"{size} {first} to {last}"
            words.append(
                f"{size} up to {last}" if first is None else f"{size} from {first}" if last is None else exactly
            )
        return ", ".join(words)


Choice = str | Ranges


def name_at(choice: Choice, size: int) -> str:
    return choice if isinstance(choice, str) else choice.at(size)


def joined(pieces: Sequence[tuple[int, str]], beyond: str) -> Choice:
    """The choice of pieces (last size, name) and what runs beyond them; neighbours of one name become one range."""
    changes = [(end, name) for (end, name), (_, after) in pairwise([*pieces, (0, beyond)]) if name != after]
    return Ranges(tuple(end for end, _ in changes), (*(name for _, name in changes), beyond)) if changes else beyond


@dataclass(frozen=True)
class Within:
    """A choice that holds for sizes from `first` to `last`, both included."""

    first: int
    last: int
    choice: Choice

    def over(self, outside: Choice) -> Choice:
        """This choice for the sizes it holds for, `outside` for all others."""

        def name(size: int) -> str:
            return name_at(self.choice if self.first <= size <= self.last else outside, size)

        both = (choice.ends for choice in (self.choice, outside) if isinstance(choice, Ranges))
        ends = sorted({self.first - 1, self.last}.union(*both) - {-1})
        return joined([(end, name(end)) for end in ends], name(ends[-1] + 1))


def parse(value: Any) -> Choice:
    """A choice as it stands in a file. Errors: ValueError with what is wrong and what was expected."""
    if isinstance(value, str | Ranges):
        return value
    ranges = value if isinstance(value, Sequence) and value else [value]
    *ended, beyond = ranges
    for pair in ended:
        if not (isinstance(pair, Sequence) and [type(x) for x in pair] == [int, str]):
            raise ValueError(f'{pair!r} is no range, expected [last size, "name"]')
    if not isinstance(beyond, str):
        raise ValueError(f"{beyond!r} is at the end, expected the name of what runs beyond the last range")
    ends = tuple(pair[0] for pair in ended)
    if any(a >= b for a, b in zip((-1, *ends), ends)):
        raise ValueError(f"the ranges end at {', '.join(map(str, ends))}, expected increasing sizes")
    return Ranges(ends, (*(pair[1] for pair in ended), beyond)) if ended else beyond


def names(choice: Choice) -> tuple[str, ...]:
    """The implementations that a choice names."""
    return (choice,) if isinstance(choice, str) else choice.names
