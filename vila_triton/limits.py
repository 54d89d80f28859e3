"""Numbers within limits, for command-line options and for arguments in Python."""

import argparse
import numbers
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The ints or floats from `minimum` (left out if `exclude_minimum`) to `maximum`.

    It is called as `type=` of an option to parse a number; argparse then names the option in its error.
    """

    number_type: type[int] | type[float]
    minimum: float
    maximum: float
    exclude_minimum: bool = False

    def __str__(self) -> str:
        noun = "a whole number" if self.number_type is int else "a number"
        bound = "above" if self.exclude_minimum else "of at least"
        return f"{noun} {bound} {self.minimum:g} and at most {self.maximum:.7g}"

    def contains(self, x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, numbers.Integral if self.number_type is int else numbers.Real):
            return False
        within = self.minimum <= x <= self.maximum  # pyright: ignore[reportOperatorIssue]
        return within and not (self.exclude_minimum and x == self.minimum)

    def __call__(self, text: str) -> Any:
        try:
            x = self.number_type(text)
        except ValueError:
            x = None
        if not self.contains(x):
            raise argparse.ArgumentTypeError(f"{text!r} is given, expected {self}")
        return x

    def validate(self, name: str, x: Any) -> Any:
        """Return x as `number_type`. Errors: ValueError naming the argument."""
        if not self.contains(x):
            raise ValueError(f"{name} is {x!r}, expected {self}")
        return self.number_type(x)


COUNT = Limits(int, 1, 10**6)
COUNT_OR_ZERO = Limits(int, 0, 10**6)
SEED = Limits(int, 0, 2**63 - 1)
POSITIVE = Limits(float, 0, 1e6, exclude_minimum=True)
