"""The values that a size of an op may have; the annotations of `example_inputs` name them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class IntRange:
    """The integers low, low + step, ... up to high (inclusive)."""

    low: int
    high: int
    step: int = 1

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and value in range(self.low, self.high + 1, self.step)


class OneOf:
    """One of the listed values; the first is the simplest, towards which a failing case shrinks."""

    def __init__(self, *values: Any):
        self.values = values

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __repr__(self) -> str:
        return f"OneOf{self.values}"


def may_be(domain: IntRange | OneOf, value: object) -> bool:
    """Return whether a call may have this value: one of those listed, or any number from 0 on in place of numbers, of
    which a domain lists those that are tested.
    """
    if isinstance(domain, IntRange) or type(domain.values[0]) is int:
        return type(value) is int and value >= 0
    return any(type(value) is type(x) and value == x for x in domain.values)
