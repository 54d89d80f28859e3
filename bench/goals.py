"""Checks the goals of speed on measured rows: `python -m bench.goals ROWS.jsonl`, rows of `bench.ops OP --default`

Goals of int4_matmul, and, where there are rows of them, of attention (`bench.measure.goals_attention`).

Ours is the implementation that runs by default at the sizes (rows marked `served`); beside it stand "dense" (cuBLAS on
the float weight), "dequant" (dequantize, then cuBLAS) and other libraries, all timed in the same run. Ratios are their
times over ours. There are three goals:

    decode   up to 16 rows, at 8192 x 8192 and the shapes of Llama-3-VILA1.5-8b, 2.2 times as fast as dense (as Marlin
             and humming are on an H100); 3 times would be better still
    floor    at any number of rows, no slower than 0.95 of the faster of dense and dequant
    gemlite  nowhere slower than gemlite, with the config it ships for a shape, else its first, whatever the accuracy
             of its numbers (it adds up in float16)

A goal is met if it is met at every point that was measured; points without both times are counted. Goals are for GPUs;
rows of a CPU are for rehearsal.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._tool import tool
from .measure import goals_attention, rows
from .measure.format import format_config, format_seconds
from .measure.measured_points import MeasuredPoint, measured_points, report_goal

OP = "int4_matmul"
DECODE, STRETCH, FLOOR = 2.2, 3.0, 0.95


def floor_ratio(point: MeasuredPoint) -> float | None:
    """Returns the time of the faster of dense and dequant over ours, if both were measured."""
    return point.ratio("dense", "dequant") if {"dense", "dequant"} <= point.seconds.keys() else None


def report_goals(points: Sequence[MeasuredPoint]) -> Iterator[str]:
    """Yields the lines of the goals of int4_matmul."""
    decode_points = [p for p in points if p.case != "models" and p.sizes["m"] <= 16]
    yield from report_goal("decode", DECODE, lambda p: p.ratio("dense"), decode_points)
    ratios = [r for p in decode_points if (r := p.ratio("dense")) is not None]
    yield f"  stretch: {sum(r >= STRETCH for r in ratios)} of {len(ratios)} points reach {STRETCH}"
    yield from report_goal("floor", FLOOR, floor_ratio, points)
    yield from report_goal("gemlite", 1.0, lambda p: p.ratio("gemlite", "gemlite_float32"), points)


def report_all_goals(measured_rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines that say which goals are met, for each op that there are rows of."""
    measured = measured_points(measured_rows)
    return [
        *(report_goals(measured) if any(p.default_row for p in measured) else ()),
        *goals_attention.report_attention_goals(measured_rows),
    ]


def points_table(points: Sequence[MeasuredPoint]) -> Iterator[str]:
    """Yields a line per point: ours, its rates as shares of the peak rates, and the times of the others as multiples of
    ours.
    """
    other_impls = list(dict.fromkeys(name for p in points for name in p.seconds))
    yield f"{'':28}{'ours':36}{'time':>11}{'of GB/s':>9}{'of FLOP/s':>10}" + "".join(
        f"{name:>17}" for name in other_impls
    )
    for p in points:
        if p.default_row is None:
            yield f"{p!s:28}no time"
            continue
        name = f"{p.default_row['impl']} {format_config(p.default_row['config'])}"
        shares = f"{p.default_row['bytes_share']:9.1%}{p.default_row['flops_share']:10.1%}"
        ratios = [p.ratio(other) for other in other_impls]
        times = "".join(f"{'-' if r is None else f'{r:.2f} x':>17}" for r in ratios)
        yield f"{p!s:28}{name:36.36}{format_seconds(p.default_row['seconds'])}{shares}{times}"


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl")
    args = parser.parse_args(argv)
    measured_rows = list(rows.read(*args.rows))
    measured = measured_points(measured_rows)
    attention = list(goals_attention.report_attention_goals(measured_rows))
    if not attention and not any(p.default_row for p in measured):
        raise ValueError(
            f"no row of {OP} is marked as served; python -m bench.ops {OP} --default --out FILE makes some"
        )
    devices = sorted({row["device"] for row in measured_rows if row.get("op") == OP})
    if any(p.default_row for p in measured):
        print(f"{OP} on {', '.join(devices)}: others' times as multiples of ours")
        print(*points_table(measured), *report_goals(measured), sep="\n")
    for line in attention:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
