"""Measured points for `bench.goals`: the times of our default implementation and of all others, for
one op at one size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MeasuredPoint:
    """One case and its sizes: the row of our default implementation, and the seconds of each other one by name."""

    case: str
    sizes: Mapping[str, Any]
    default_row: Row | None
    seconds: Mapping[str, float]

    def ratio(self, *impls: str) -> float | None:
        """Returns the time of the fastest of some implementations over ours; None if one of the two
        was not measured.
        """
        times = [self.seconds[name] for name in impls if name in self.seconds]
        return min(times) / self.default_row["seconds"] if self.default_row and times else None

    def __str__(self) -> str:
        if "m" not in self.sizes:
            return " ".join(f"{name}={self.sizes[name]}" for name in ("b", "s", "t") if name in self.sizes)
        return f"m={self.sizes['m']} n={self.sizes['n']} k={self.sizes['G'] * self.sizes['group']}"


def measured_points(measured_rows: Sequence[Row], op: str = "int4_matmul") -> list[MeasuredPoint]:
    """Returns the points of an op, by case and sizes. Of repeated measurements the last counts. Sizes at which nothing
    could be timed are points too.
    """
    default_rows: dict[tuple, Row] = {}
    rows_by_impl: dict[tuple, dict[str, Row]] = {}
    for row in measured_rows:
        if row.get("op") == op and row["kind"] in ("op", "refused"):
            key = row["case"], tuple(row["sizes"].items())
            impl_rows = rows_by_impl.setdefault(key, {})
            if row["served"]:
                default_rows[key] = row
            else:
                impl_rows[row["impl"]] = row
    result = []
    for key, impl_rows in rows_by_impl.items():
        default_row = default_rows.get(key)
        if default_row and default_row["kind"] == "refused":
            default_row = None
        seconds = {name: row["seconds"] for name, row in impl_rows.items() if row["kind"] == "op"}
        if default_row and default_row["impl"] == "dequant":  # the default implementation is timed once
            seconds["dequant"] = default_row["seconds"]
        result.append(MeasuredPoint(key[0], dict(key[1]), default_row, seconds))
    return result


def report_goal(
    name: str, min_ratio: float, ratio: Callable[[MeasuredPoint], float | None], points: Sequence[MeasuredPoint]
) -> Iterator[str]:
    """Yields a line for a goal, and one for each point below it."""
    ratios = {str(p): r for p in points if (r := ratio(p)) is not None}
    missing = f"; {len(points) - len(ratios)} of {len(points)} points not measured" if len(ratios) < len(points) else ""
    if not ratios:
        yield f"goal {name}: NOT MEASURED{missing}"
        return
    shortfalls = {point: r for point, r in ratios.items() if r < min_ratio}
    worst = min(ratios, key=lambda point: ratios[point])
    state = "NOT MET" if shortfalls else "met where it was measured" if missing else "MET"
    summary = f"{len(ratios) - len(shortfalls)} of {len(ratios)} points reach {min_ratio}"
    yield f"goal {name}: {state}: {summary}; the least is {ratios[worst]:.2f} at {worst}{missing}"
    yield from (f"  {r:.2f} at {point}" for point, r in sorted(shortfalls.items(), key=lambda item: item[1]))
