"""A figure with its name and its rows: the result of every plotting function."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PlottedFigure:
    """A figure, the name of its files, and the rows it was made from, which give it its stamp."""

    name: str
    figure: Figure
    rows: Sequence[Row]


def format_entries(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """Returns the named entries as one text: n=4096 G=32."""
    return " ".join(f"{name}={values[name]}" for name in names)
