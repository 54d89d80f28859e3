"""The choice of an implementation: one name, names for ranges of a size that differs from call to call, or a choice for
calls of certain sizes before that for all others.

    [[4, "gemv"], [64, "splitk"], "prefill"]

chooses "gemv" up to size 4, "splitk" up to 64, "prefill" beyond. The size is the first of the op's `dynamic_sizes`.

    [{dtype = "bfloat16", group = [32, 64], run = [[32, "aten"], "blocked"]}, [4, "bags"], "blocked"]

chooses by the first table whose sizes, named as in the op's `example_inputs`, all are those of the call; what follows
the tables holds for all other calls.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from ..files.reading import short_repr


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


RangedChoice = str | ChoiceBySize


@dataclass(frozen=True)
class Case:
    """A choice for the calls whose sizes are among `sizes`: ((name, (value, ...)), ...)."""

    sizes: tuple[tuple[str, tuple[int | str | bool, ...]], ...]
    choice: RangedChoice

    def fits(self, sizes: Mapping[str, Any]) -> bool:
        return all(sizes.get(name) in values for name, values in self.sizes)

    def __str__(self) -> str:
        return ", ".join(f"{name} {' or '.join(map(str, values))}" for name, values in self.sizes)


@dataclass(frozen=True)
class ChoiceByCase:
    """The choice of the first case that fits, `otherwise` if none does."""

    cases: tuple[Case, ...]
    otherwise: RangedChoice

    @property
    def names(self) -> tuple[str, ...]:
        choices = [*(case.choice for case in self.cases), self.otherwise]
        return tuple(name for choice in choices for name in implementation_names(choice))

    def describe(self, name: str, size_name: str) -> str:
        """Describe the cases of one name: "dtype bfloat16: m up to 32; otherwise m up to 4"."""
        parts = []
        for head, choice in [*((f"{case}: ", case.choice) for case in self.cases), ("otherwise ", self.otherwise)]:
            if name in implementation_names(choice):
                parts.append(head + ("always" if isinstance(choice, str) else choice.describe(name, size_name)))
        return "; ".join(parts)


Choice = RangedChoice | ChoiceByCase


def map_ranged(choice: Choice, change: Callable[[RangedChoice], RangedChoice]) -> Choice:
    """Apply a function to a choice, or to every choice in one by case."""
    if isinstance(choice, ChoiceByCase):
        cases = tuple(Case(case.sizes, change(case.choice)) for case in choice.cases)
        return ChoiceByCase(cases, change(choice.otherwise))
    return change(choice)


def implementation_at(choice: Choice, size: int, sizes: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the implementation that is chosen at a size; `sizes`, all sizes of the call, decide on cases."""
    if isinstance(choice, ChoiceByCase):
        choice = next((case.choice for case in choice.cases if case.fits(sizes)), choice.otherwise)
    return choice if isinstance(choice, str) else choice.lookup(size)


def merge_ranges(pieces: Sequence[tuple[int, str]], last_name: str) -> RangedChoice:
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
    choice: RangedChoice

    def with_fallback(self, fallback: Choice) -> Choice:
        """This choice for the sizes it holds for, `fallback` for all others."""
        return map_ranged(fallback, self._with_ranged_fallback)

    def _with_ranged_fallback(self, fallback: RangedChoice) -> RangedChoice:
        def choose(size: int) -> str:
            return implementation_at(self.choice if self.first <= size <= self.last else fallback, size)

        all_ends = (choice.ends for choice in (self.choice, fallback) if isinstance(choice, ChoiceBySize))
        ends = sorted({self.first - 1, self.last}.union(*all_ends) - {-1})
        return merge_ranges([(end, choose(end)) for end in ends], choose(ends[-1] + 1))


def parse_choice(value: Any) -> Choice:
    """Parse a choice as files hold it. Raises ValueError with the fault and what was expected."""
    if isinstance(value, str | ChoiceBySize | ChoiceByCase):
        return value
    parts = value if isinstance(value, Sequence) and value else [value]
    num_cases = next((i for i, part in enumerate(parts) if not isinstance(part, Mapping)), len(parts))
    if num_cases:
        if num_cases == len(parts):
            raise ValueError("a case is at the end, expected the choice for all other calls after it")
        return ChoiceByCase(tuple(map(parse_case, parts[:num_cases])), parse_ranges(parts[num_cases:]))
    return parse_ranges(parts)


def parse_case(table: Mapping[str, Any]) -> Case:
    """Parse {dtype = "bfloat16", group = [32, 64], run = choice}. Raises ValueError as `parse_choice` does."""
    if "run" not in table or len(table) < 2:
        raise ValueError(f'{dict(table)!r} is no case, expected sizes and "run", the choice for calls of these sizes')
    sizes = {name: tuple(x) if isinstance(x, list | tuple) else (x,) for name, x in table.items() if name != "run"}
    run = table["run"]
    return Case(tuple(sizes.items()), run if isinstance(run, str | ChoiceBySize) else parse_ranges(run))


def parse_ranges(ranges: Any) -> RangedChoice:
    """Parse a name, or ranges that end with one. Raises ValueError as `parse_choice` does."""
    ranges = ranges if isinstance(ranges, Sequence) and not isinstance(ranges, str) and ranges else [ranges]
    *bounded_ranges, last_name = ranges
    for pair in bounded_ranges:
        if not (isinstance(pair, Sequence) and [type(x) for x in pair] == [int, str]):
            raise ValueError(f'{short_repr(pair)} is no range, expected [last size, "name"]')
    if not isinstance(last_name, str):
        raise ValueError(f"{short_repr(last_name)} is at the end, expected the name of what runs beyond the last range")
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

    def rename(choice: RangedChoice) -> RangedChoice:
        if isinstance(choice, str):
            return new_names.get(choice, choice)
        return ChoiceBySize(choice.ends, tuple(new_names.get(name, name) for name in choice.names))

    return map_ranged(choice, rename)
