"""What goals are made of: a point is one shape of an op, what ours takes there, and what the others take."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One shape and number of rows: what ours is there, and the seconds of the others by implementation."""

    case: str
    sizes: Mapping[str, Any]
    ours: Row | None
    seconds: Mapping[str, float]

    def ratio(self, *others: str) -> float | None:
        """How many times as long as ours the fastest of the others takes; None if one of the two has no time."""
        known = [self.seconds[name] for name in others if name in self.seconds]
        return min(known) / self.ours["seconds"] if self.ours and known else None

    def __str__(self) -> str:
        if "m" not in self.sizes:
            return " ".join(f"{name}={self.sizes[name]}" for name in ("b", "s", "t") if name in self.sizes)
        return f"m={self.sizes['m']} n={self.sizes['n']} k={self.sizes['G'] * self.sizes['group']}"


def points(found: Sequence[Row], op: str = "int4_matmul") -> list[Point]:
    """By case, shape and rows; of what was measured twice, the last. Rows without a time count as points too."""
    at: dict[tuple, dict[str, Row]] = {}
    for row in found:
        if row.get("op") == op and row["kind"] in ("op", "refused"):
            key = row["case"], tuple(row["sizes"].items())
            at.setdefault(key, {})["" if row["served"] else row["impl"]] = row
    made = []
    for (case, sizes), here in at.items():
        timed = {name: row for name, row in here.items() if row["kind"] == "op"}
        seconds = {name: row["seconds"] for name, row in timed.items() if name}
        ours = timed.get("")
        if ours and ours["impl"] == "dequant":  # what runs by default is timed once
            seconds["dequant"] = ours["seconds"]
        made.append(Point(case, dict(sizes), ours, seconds))
    return made


def goal(name: str, least: float, ratio: Callable[[Point], float | None], among: Sequence[Point]) -> Iterator[str]:
    """A line, and one for each point that falls short."""
    known = {str(p): r for p in among if (r := ratio(p)) is not None}
    missing = f"; {len(among) - len(known)} of {len(among)} points not measured" if len(known) < len(among) else ""
    if not known:
        yield f"goal {name}: NOT MEASURED{missing}"
        return
    short = {point: r for point, r in known.items() if r < least}
    worst = min(known, key=lambda point: known[point])
    state = "NOT MET" if short else "met where it was measured" if missing else "MET"
    met = f"{len(known) - len(short)} of {len(known)} points reach {least}"
    yield f"goal {name}: {state}: {met}; the least is {known[worst]:.2f} at {worst}{missing}"
    yield from (f"  {r:.2f} at {point}" for point, r in sorted(short.items(), key=lambda item: item[1]))
