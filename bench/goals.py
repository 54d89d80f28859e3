"""Is int4_matmul as fast as it is to be? `python -m bench.goals ROWS.jsonl`, rows of `bench.ops int4_matmul --served`

Ours is what runs by default at the sizes (rows marked `served`), beside it stand "dense" (cuBLAS on the plain weight),
"dequant" (dequantise, then cuBLAS) and other libraries, all timed in the same run. Ratios say how many times as long
they take. Three goals:

    decode   up to 16 rows, at 8192 x 8192 and the shapes of Llama-3-VILA1.5-8b, 2.2 times as fast as dense (what Marlin
             and humming reach on an H100); 3 times would be better still
    floor    at any number of rows, no slower than 0.95 of the faster of dense and dequant
    gemlite  no slower than gemlite anywhere, with the config it ships for a shape, else its first, and whatever its
             numbers are (it adds up in float16)

A goal is met if it is at every point that was measured; points without both times are counted. The rows of a run on
a CPU rehearse this: goals are for GPUs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import rows
from .spelling import brief, unit

OP = "int4_matmul"
DECODE, STRETCH, FLOOR = 2.2, 3.0, 0.95
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
        return f"m={self.sizes['m']} n={self.sizes['n']} k={self.sizes['G'] * self.sizes['group']}"


def points(found: Sequence[Row]) -> list[Point]:
    """By case, shape and rows; of what was measured twice, the last. Rows without a time count as points too."""
    at: dict[tuple, dict[str, Row]] = {}
    for row in found:
        if row.get("op") == OP and row["kind"] in ("op", "refused"):
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


def floor(point: Point) -> float | None:
    return point.ratio("dense", "dequant") if {"dense", "dequant"} <= point.seconds.keys() else None


def goals(at: Sequence[Point]) -> Iterator[str]:
    few = [p for p in at if p.case != "models" and p.sizes["m"] <= 16]
    yield from goal("decode", DECODE, lambda p: p.ratio("dense"), few)
    stretch = [r for p in few if (r := p.ratio("dense")) is not None]
    yield f"  stretch: {sum(r >= STRETCH for r in stretch)} of {len(stretch)} points reach {STRETCH}"
    yield from goal("floor", FLOOR, floor, at)
    yield from goal("gemlite", 1.0, lambda p: p.ratio("gemlite", "gemlite_float32"), at)


def table(at: Sequence[Point]) -> Iterator[str]:
    """One line a point: ours, its rates as shares of the ceilings, and how many times as long the others take."""
    others = list(dict.fromkeys(name for p in at for name in p.seconds))
    yield f"{'':28}{'ours':36}{'time':>11}{'of GB/s':>9}{'of FLOP/s':>10}" + "".join(f"{name:>17}" for name in others)
    for p in at:
        if p.ours is None:
            yield f"{p!s:28}no time"
            continue
        name = f"{p.ours['impl']} {brief(p.ours['config'])}"
        shares = f"{p.ours['bytes_share']:9.1%}{p.ours['flops_share']:10.1%}"
        ratios = [p.ratio(other) for other in others]
        times = "".join(f"{'-' if r is None else f'{r:.2f} x':>17}" for r in ratios)
        yield f"{p!s:28}{name:36.36}{unit(p.ours['seconds'])}{shares}{times}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl")
    args = parser.parse_args(argv)
    try:
        found = list(rows.read(*args.rows))
        at = points(found)
        if not any(p.ours for p in at):
            raise ValueError(
                f"no row of {OP} is marked as served; python -m bench.ops {OP} --served --out FILE makes some"
            )
    except (ValueError, OSError, KeyError) as error:
        print(f"bench.goals: {error}", file=sys.stderr)
        return 2
    devices = sorted({row["device"] for row in found if row.get("op") == OP})
    print(f"{OP} on {', '.join(devices)}: others' times as multiples of ours")
    print(*table(at), *goals(at), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
