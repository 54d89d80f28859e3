"""Figures of timed ops: the roofline, the time against a size, and the speedup over others."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bench.plots.style import (
    COLORS,
    GRAY,
    MARKERS,
    format_size_axis,
    format_unit_axis,
    new_figure,
    panels,
    shared_legend,
)
from vila_triton.registry import REFERENCE

from .figure import PlottedFigure, Row, format_entries

NAME_ANGLE = 55  # degrees at which names stand in a roofline
USUALLY_SWEPT = ("m", "rows", "s", "t", "b")


def impl_styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Returns a color for each implementation; peers are dashed, the reference is gray."""
    names = sorted({(bool(row["peer"]), row["impl"]) for row in rows if row["impl"] != REFERENCE})
    styles: dict[str, dict[str, Any]] = {REFERENCE: {"color": GRAY, "linestyle": ":"}}
    for (peer, name), color in zip(names, COLORS * len(names)):
        styles[name] = {"color": color, "linestyle": "--" if peer else "-"}
    return styles


def plot_roofline(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """Every measured point under the peak rates measured in the same run; the fastest of our implementations of each op
    is named. Hollow points were too small to leave the cache, so they may lie above the limit of memory.
    """
    points, ceilings = rows["op"], rows["ceiling"][-1:]
    fig, ax = new_figure("Roofline: every measured point", 9, 5.6)
    styles, ops = impl_styles(points), sorted({row["op"] for row in points})
    for row in points:
        color, marker = styles[row["impl"]]["color"], MARKERS[ops.index(row["op"]) % len(MARKERS)]
        face = color if row["cold"] else "none"
        ax.plot(
            *roofline_point(row),
            marker,
            color=color,
            markerfacecolor=face,
            markersize=5,
            alpha=0.75,
            markeredgewidth=0.8,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    for peaks in ceilings:
        draw_roofs(ax, peaks, {row["sizes"].get("dtype", "float32") for row in points})
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.27)  # room for the names
    format_unit_axis(ax.xaxis, None)
    format_unit_axis(ax.yaxis, "FLOP/s")
    ax.set_xlabel("FLOP for each byte that must move")
    ax.set_ylabel("rate")
    for name in (name for name in styles if any(row["impl"] == name for row in points)):
        ax.plot([], [], "o", color=styles[name]["color"], label=name)
    for i, op in enumerate(ops):
        ax.plot([], [], MARKERS[i % len(MARKERS)], color="#999999", label=op)
    if not all(row["cold"] for row in points):
        ax.plot([], [], "o", color="#999999", markerfacecolor="none", label="hollow: out of the cache")
    shared_legend(fig, [ax])
    own_rows = [[row for row in points if row["op"] == op and not row["peer"]] for op in ops]
    label_best_points(fig, ax, [op_rows for op_rows in own_rows if op_rows], ceilings)
    yield PlottedFigure("roofline", fig, [*points, *ceilings])


def roofline_point(row: Row) -> tuple[float, float]:
    """Returns (FLOPs per byte, FLOP/s) of a row."""
    return row["flops"] / row["bytes"], row["flops"] / row["seconds"]


def draw_roofs(ax: Axes, peaks: Row, dtypes: set[str]) -> None:
    """Draws the bandwidth as a slope and the rate of each timed dtype as a level."""
    left, right = ax.get_xlim()
    rates = {dtype: peaks["flops"][dtype] for dtype in dtypes if dtype in peaks["flops"]}
    right = max(right, 2 * max(rates.values(), default=0) / peaks["bandwidth"])
    top = max(rates.values(), default=peaks["bandwidth"] * right)
    slope = f"memory, {EngFormatter('B/s', places=2)(peaks['bandwidth'])}"
    ax.plot([left, top / peaks["bandwidth"]], [left * peaks["bandwidth"], top], color="black", linewidth=1, label=slope)
    for (dtype, rate), line in zip(sorted(rates.items()), ("-", "--", ":")):
        name = f"{dtype}, {EngFormatter('FLOP/s', places=0)(rate)}"
        ax.plot([rate / peaks["bandwidth"], right], [rate, rate], line, color="black", linewidth=1, label=name)
    ax.set_xlim(left, right)


def label_best_points(fig: Figure, ax: Axes, own_rows: Sequence[Sequence[Row]], ceilings: Sequence[Row]) -> None:
    """Names each op's point of the highest rate above the roof, where there are no points. Names that would overlap
    those before them move to the right.
    """
    fig.draw_without_rendering()
    slope, step = math.radians(NAME_ANGLE), 9 * fig.dpi / 72
    occupied = -math.inf  # how far right the last name lies, across the direction of the names
    best = [max(op_rows, key=lambda row: roofline_point(row)[1]) for op_rows in own_rows]
    for row, of_op in sorted(zip(best, own_rows), key=lambda pair: roofline_point(pair[0])[0]):
        x, y = roofline_point(row)
        roofs = (min(m["bandwidth"] * x, m["flops"].get(row["sizes"].get("dtype", "float32"), y)) for m in ceilings)
        top = 1.25 * max(y, *roofs)
        right, up = ax.transData.transform((x, top))
        across = right * math.sin(slope) - up * math.cos(slope)
        shift = max(0.0, occupied + step - across) / math.sin(slope)
        occupied = across + shift * math.sin(slope)
        ax.plot([x, x], [y, top], color=GRAY, linewidth=0.6)
        name = f"{row['op']} {row['impl']} {format_entries(row['sizes'], varying_sizes(of_op)[:1])}"
        offset = 72 * shift / fig.dpi, 3
        ax.annotate(name, (x, top), offset, textcoords="offset points", fontsize=7, color=GRAY, rotation=NAME_ANGLE)


def varying_sizes(rows: Sequence[Row]) -> list[str]:
    """Returns the sizes that differ between rows: first those that are usually swept, and of these the one with most
    values.
    """
    values = {name: {row["sizes"][name] for row in rows} for name in rows[0]["sizes"]}
    varied = [
        name for name, distinct in values.items() if len(distinct) > 1 and all(isinstance(x, int) for x in distinct)
    ]
    return sorted(varied, key=lambda name: (name not in USUALLY_SWEPT, -len(values[name])))


def group_by_sweep(rows: Sequence[Row]) -> dict[str, dict[tuple[tuple[str, Any], ...], list[Row]]]:
    """Returns the rows of one op by the size that varies in their case, then by the sizes that stay; of each only the
    fastest config.
    """
    best: dict[Any, Row] = {}
    for row in rows:
        key = row["impl"], tuple(row["sizes"].items())
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in best.values():
        cases[row["case"]].append(row)
    groups: dict[str, dict[Any, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for case in cases.values():
        swept = (varying_sizes(case) or list(case[0]["sizes"]))[0]
        for row in case:
            fixed = tuple((name, value) for name, value in row["sizes"].items() if name != swept)
            groups[swept][fixed].append(row)
    return groups


def shape_titles(shapes: Sequence[tuple[tuple[str, Any], ...]]) -> tuple[list[str], str]:
    """Returns one text per shape with the sizes that differ, and one text with those that are shared."""
    tables = [dict(shape) for shape in shapes]
    differ = [name for name in tables[0] if len({str(table.get(name)) for table in tables}) > 1]
    shared = format_entries(tables[0], [name for name in tables[0] if name not in differ])
    return [format_entries(table, differ) or shared for table in tables], shared if differ else ""


def plot_time(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """Seconds against the size that varies, a panel per shape; the band is the 20th to the 80th percentile."""
    for op in sorted({row["op"] for row in rows["op"]}):
        op_rows = [row for row in rows["op"] if row["op"] == op]
        styles = impl_styles(op_rows)
        for swept, shapes in group_by_sweep(op_rows).items():
            names, shared = shape_titles(list(shapes))
            fig, axes = panels(f"{op}: time against {swept}" + f"   {shared}" * bool(shared), names)
            for ax, shape_rows in zip(axes, shapes.values()):
                for impl in sorted({row["impl"] for row in shape_rows}, key=list(styles).index):
                    draw_time(ax, [row for row in shape_rows if row["impl"] == impl], swept, impl, styles[impl])
                for peaks in rows["ceiling"][-1:]:
                    draw_limit(ax, shape_rows, swept, peaks)
                format_size_axis(ax, [row["sizes"][swept] for row in shape_rows])
                ax.set_yscale("log")
                format_unit_axis(ax.yaxis, "s")
                ax.set_xlabel(swept)
            axes[0].set_ylabel("time of a call")
            shared_legend(fig, axes)
            yield PlottedFigure(f"time-{op}-{swept}", fig, [*op_rows, *rows["ceiling"][-1:]])


def draw_time(ax: Axes, rows: Sequence[Row], swept: str, name: str, style: Mapping[str, Any]) -> None:
    """Draws the times of one implementation."""
    rows = sorted(rows, key=lambda row: row["sizes"][swept])
    x = [row["sizes"][swept] for row in rows]
    ax.plot(x, [row["seconds"] for row in rows], marker=".", label=name, **style)
    low, high = ([row[end] for row in rows] for end in ("low", "high"))
    ax.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def draw_limit(ax: Axes, rows: Sequence[Row], swept: str, peaks: Row) -> None:
    """Draws the least time under the peak rates: that of the bytes or of the FLOPs, whichever is longer."""
    min_seconds = {}
    for row in rows:
        rate = peaks["flops"].get(row["sizes"].get("dtype", "float32"), float("inf"))
        min_seconds[row["sizes"][swept]] = max(row["bytes"] / peaks["bandwidth"], row["flops"] / rate)
    ax.plot(*zip(*sorted(min_seconds.items())), color="black", linewidth=0.8, label="limit of this machine")


def plot_speedup(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """The time of other implementations over that of our fastest, a panel for each of them, shape by size."""
    for op in sorted({row["op"] for row in rows["op"]}):
        op_rows = [row for row in rows["op"] if row["op"] == op]
        baselines = sorted({row["impl"] for row in op_rows if row["peer"] or row["impl"] == REFERENCE})
        for swept, shapes in group_by_sweep(op_rows).items():
            values = sorted({row["sizes"][swept] for shape_rows in shapes.values() for row in shape_rows})
            tables = {baseline: speedup_table(shapes, swept, values, baseline) for baseline in baselines}
            tables = {other: table for other, table in tables.items() if not np.isnan(table).all()}
            if not tables:
                continue
            names, shared = shape_titles(list(shapes))
            if len(names) == 1:
                names, shared = [""], names[0]
            fig, axes = panels(
                f"{op}: ours against others   {shared}",
                [f"time of {other} / time of our fastest" for other in tables],
                columns=2,
                width=1.6 + 0.62 * len(values) + 0.06 * max(map(len, names)),
                height=0.9 + 0.34 * len(names),
            )
            for ax, table in zip(axes, tables.values()):
                draw_heatmap(ax, table, [str(x) for x in values], names)
                ax.set_xlabel(swept)
            yield PlottedFigure(f"speedup-{op}-{swept}", fig, op_rows)


def speedup_table(shapes: Mapping[Any, Sequence[Row]], swept: str, values: Sequence[int], baseline: str) -> np.ndarray:
    """Returns [shapes, values]: the baseline's time over that of our fastest; NaN where one of the two was not
    measured.
    """
    table = np.full((len(shapes), len(values)), np.nan)
    for i, shape_rows in enumerate(shapes.values()):
        for j, value in enumerate(values):
            matching = [row for row in shape_rows if row["sizes"][swept] == value]
            own_seconds = [row["seconds"] for row in matching if not row["peer"] and row["impl"] != REFERENCE]
            baseline_seconds = [row["seconds"] for row in matching if row["impl"] == baseline]
            if own_seconds and baseline_seconds:
                table[i, j] = min(baseline_seconds) / min(own_seconds)
    return table


def draw_heatmap(ax: Axes, table: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Draws blue where ours is faster, red where it is slower, white where they are the same; colors end at 4 times."""
    ax.imshow(np.log2(table), cmap="RdBu", norm=TwoSlopeNorm(0, -2, 2), aspect="auto")
    for (i, j), ratio in np.ndenumerate(table):
        text = "-" if np.isnan(ratio) else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
        color = "white" if abs(np.log2(ratio)) > 1.2 else "black"
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)
