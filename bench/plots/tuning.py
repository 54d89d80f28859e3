"""Figures of a search: the best time for each pair of settings, and which configs were not launched and why."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from bench.plots.style import panels
from bench.tuner.table import TIMED_STATUSES

from .figure import PlottedFigure, Row, format_entries

MAX_SETTINGS = 4  # settings drawn, those of most effect
MAX_RATIO = 3.0  # times the best: the end of the colours


def plot_tuning(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """A figure for each op, implementation and sizes; a panel per pair of settings, a cell for the best of the rest."""
    searches: dict[Any, list[Row]] = defaultdict(list)
    for row in rows["tune"]:
        searches[row["op"], row["impl"], tuple(row["sizes"].items()), row.get("search")].append(row)
    count: Counter[str] = Counter()
    for (op, impl, sizes, _), search_rows in sorted(searches.items(), key=str):
        count[f"{op}-{impl}"] += 1
        yield PlottedFigure(
            f"tuning-{op}-{impl}-{count[f'{op}-{impl}']}",
            search_figure(op, impl, dict(sizes), search_rows),
            search_rows,
        )


def search_figure(op: str, impl: str, sizes: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """Draws one search."""
    timed = [row for row in rows if row["status"] in TIMED_STATUSES]
    settings = {name for row in rows for name in row["config"]}
    varied = [name for name in sorted(settings) if len({str(row["config"].get(name)) for row in rows}) > 1]
    shown = sorted(varied, key=lambda name: -setting_effect(timed, name))[:MAX_SETTINGS] or sorted(settings)[:1]
    pairs = list(combinations(shown, 2)) or [(name, None) for name in shown]
    best = min((row["seconds"] for row in timed), default=float("nan"))
    timer = ", ".join(sorted({row["timer"] for row in timed}))
    title = (
        f"{op} {impl}: {format_entries(sizes, sizes)}\ntimes of the best, {best * 1e6:.4g} µs ({timer or 'none timed'})"
    )
    if omitted := [name for name in varied if name not in shown]:
        title += f"; of less effect, not drawn: {', '.join(omitted)}"
    max_values = max(len(sorted_values(rows, name)) for name in shown)
    fig, axes = panels(
        title, ["" for _ in pairs], width=max(3.4, 0.45 * max_values), height=max(2.7, 0.25 * max_values)
    )
    for ax, (x, y) in zip(axes, pairs):
        draw_cells(ax, rows, x, y, best)
    return fig


def setting_effect(timed: Sequence[Row], name: str) -> float:
    """Returns the slowdown from a setting's best value to its worst, all other settings chosen well."""
    best: dict[Any, float] = defaultdict(lambda: float("inf"))
    for row in timed:
        value = row["config"].get(name)
        best[value] = min(best[value], row["seconds"])
    return max(best.values()) / min(best.values()) if best else 1.0


def draw_cells(ax: Axes, rows: Sequence[Row], x: str, y: str | None, best: float) -> None:
    """Draws the best time of each pair of values over the best of all; hatched with the reason where no config was
    timed.
    """
    columns, lines = sorted_values(rows, x), sorted_values(rows, y) if y else [None]
    table = np.full((len(lines), len(columns)), np.nan)
    for (i, j), _ in np.ndenumerate(table):
        matching = [
            row for row in rows if row["config"].get(x) == columns[j] and (not y or row["config"].get(y) == lines[i])
        ]
        times = [row["seconds"] for row in matching if row["status"] in TIMED_STATUSES]
        if times:
            table[i, j] = min(times) / best
            dark_background = table[i, j] > 1 + 0.6 * (MAX_RATIO - 1)
            weight = "bold" if table[i, j] == 1 else "normal"
            ax.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", fontsize=8, fontweight=weight,
                    color="white" if dark_background else "black")  # fmt: skip
        elif matching:
            ax.add_patch(
                Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#bbbbbb", linewidth=0)
            )
            reason = Counter(row["status"] for row in matching).most_common(1)[0][0]
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            ax.text(j, i, reason, ha="center", va="center", fontsize=7, color="#666666", bbox=box)
    ax.imshow(table, cmap="YlGnBu", vmin=1, vmax=MAX_RATIO, aspect="auto")
    ax.set_xticks(range(len(columns)), [str(value) for value in columns])
    ax.set_yticks(range(len(lines)), [str(value) if y else "" for value in lines])
    ax.set_xlabel(x)
    ax.set_ylabel(y or "")
    ax.grid(False)


def sorted_values(rows: Sequence[Row], name: str) -> list[Any]:
    """Returns the values of a setting, numbers by size and then the rest."""
    values = {row["config"].get(name) for row in rows}
    return sorted(values, key=lambda v: (not isinstance(v, int), v if isinstance(v, int) else 0, str(v)))
