"""Numbers within limits: of options on a command line and of arguments in Python alike."""

import argparse
import numbers
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Numbers of a kind from `least` to `most`; `above`: `least` itself is none of them.

    As `type=` of an option it reads a number, and argparse names the option of one that is refused.
    """

    kind: type[int] | type[float]
    least: float
    most: float
    above: bool = False

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        return f"{what} {'above' if self.above else 'of at least'} {self.least:g} and at most {self.most:.7g}"

    def hold(self, x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, numbers.Integral if self.kind is int else numbers.Real):
            return False
        within = self.least <= x <= self.most  # pyright: ignore[reportOperatorIssue]
        return within and not (self.above and x == self.least)

    def __call__(self, text: str) -> Any:
        try:
            x = self.kind(text)
        except ValueError:
            x = None
        if not self.hold(x):
            raise argparse.ArgumentTypeError(f"{text!r} is given, expected {self}")
        return x

    def check(self, name: str, x: Any) -> Any:
        """x as a number of the kind. Errors: ValueError naming the argument."""
        if not self.hold(x):
            raise ValueError(f"{name} is {x!r}, expected {self}")
        return self.kind(x)


COUNT = Limits(int, 1, 10**6)
MANY = Limits(int, 0, 10**6)  # or none
SEED = Limits(int, 0, 2**63 - 1)
POSITIVE = Limits(float, 0, 1e6, above=True)
