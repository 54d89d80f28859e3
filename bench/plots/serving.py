"""The figures of servers under load: times and throughput of answers by streams, and by requests a second."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.ticker import EngFormatter

from bench.plots.style import COLORS, GRAY, format_size_axis, panels, shared_legend

from .figure import PlottedFigure, Row
from .models import draw_curve

AXES = {"streams": ("streams", "requests at a time"), "arrivals": ("rate", "requests that come a second")}
PANELS = {  # title: unit, and fields by the style of their line
    "time to the first token": ("s", {"-": "ttft", ":": "ttft_p95"}),
    "time per output token": ("s", {"-": "tpot", ":": "tpot_p95"}),
    "tokens a second": ("", {"-": "tokens_per_s"}),
}
QUANTILES = {"-": "median", ":": "95th percentile"}


def plot_serving(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """A figure for each model, dtype and way in which requests come: a panel per measure, a line per server."""
    figures: dict[Any, list[Row]] = defaultdict(list)
    for row in rows["serve"]:
        figures[row["model"], row["dtype"], row["what"]].append(row)
    for (model, dtype, what), figure_rows in sorted(figures.items()):
        x, label = AXES[what]
        fig, axes = panels(f"Serving {model}, {dtype}", list(PANELS), width=3.6)
        choices = dict.fromkeys(row["choice"] for row in figure_rows)
        colors = dict(zip(choices, [COLORS[0], GRAY, *COLORS[1:]] if len(choices) > 1 else COLORS))
        for ax, (unit, fields) in zip(axes, PANELS.values()):
            for choice, (style, field) in ((c, f) for c in choices for f in fields.items()):
                line_rows = [row for row in figure_rows if row["choice"] == choice and field in row]
                name = f"{choice}, {QUANTILES[style]}" if len(fields) > 1 else None
                line_style = {"color": colors[choice], "linestyle": style, "marker": ".", "label": name}
                if line_rows:
                    draw_curve(ax, line_rows, x, field_of(field), **line_style)
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(EngFormatter(unit))
            ax.set_xlabel(label)
            format_size_axis(ax, [row[x] for row in figure_rows])
        shared_legend(fig, axes)
        yield PlottedFigure(f"serve-{model.replace('/', '-')}-{dtype}-{what}", fig, figure_rows)


def field_of(name: str) -> Callable[[Row], float]:
    """Returns a function that reads a field of a row."""
    return lambda row: row[name]
