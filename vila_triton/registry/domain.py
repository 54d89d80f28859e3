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
