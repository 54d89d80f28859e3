"""The style of every figure: axes with units, and below them where, when and from which commit the
rows were measured.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

# Okabe and Ito's colours, which those who see fewer colours can tell apart.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
GRAY = "#666666"
MARKERS = "osD^vP*Xh<>p"
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9,
        "figure.constrained_layout.h_pad": 0.08,
        "font.size": 10,
        "grid.alpha": 0.3,
        "hatch.linewidth": 0.5,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "savefig.dpi": 144,
        "svg.fonttype": "none",  # words stay words: they can be searched, and a font of the reader's draws them
        "svg.hashsalt": "vila-triton",  # the same figure from the same rows, byte for byte
    }
)


def new_figure(title: str, width: float = 8, height: float = 4.8) -> tuple[Figure, Axes]:
    """Returns an empty figure with one pair of axes."""
    fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.set_title(title, loc="left", fontweight="bold", fontsize=12)
    return fig, ax


def panels(
    title: str, names: Sequence[str], columns: int = 3, width: float = 3.7, height: float = 2.8, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """Returns a figure of small multiples, one pair of axes per name."""
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    size = (max(width * columns, 5) + 1.5, height * rows + 0.8)
    fig, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **subplots)
    fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    axes = list(grid.flat)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes, names):
        ax.set_title(name, loc="left")
    return fig, axes[: len(names)]


def shared_legend(fig: Figure, axes: Iterable[Axes]) -> None:
    """Draws one legend for all panels, beside them; a name that is in several panels stands there once."""
    handles = {name: line for ax in axes for line, name in zip(*ax.get_legend_handles_labels())}
    fig.legend(list(handles.values()), list(handles), loc="outside right upper")


def format_size_axis(ax: Axes, values: Iterable[float]) -> None:
    """Formats an x axis of sizes: logarithmic if they spread, with a tick at each; `remove_overlaps` drops labels
    without room.
    """
    ticks = sorted(set(values))
    if len(ticks) > 1 and ticks[0] > 0:
        ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 10000 else f"{x / 1024:g}k"))


def format_unit_axis(axis: Any, unit: str | None) -> None:
    """Formats a logarithmic axis with the prefixes of units (10 µs, 1 ms): a tick per power of ten, more if it spans
    little.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1,) if high > 300 * low else (1, 2, 5)))
    axis.set_major_formatter(EngFormatter(unit) if unit else FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def remove_overlaps(fig: Figure) -> None:
    """Lays the figure out and removes labels that would overlap: tick labels that reach into the one before. Titles of
    panels shrink until they end where the next begins.
    """
    fig.draw_without_rendering()
    axes = [ax for ax in fig.axes if ax.get_visible()]
    for ax in axes:
        for axis, side in ((ax.xaxis, 0), (ax.yaxis, 1)):
            drop_overlapping_ticks(axis, side)
        titles = {ax.get_title(), ax.get_title("left")} - {""}
        for title in (x for x in ax.get_children() if isinstance(x, Text) and x.get_text() in titles):
            box, boxes = title.get_window_extent(), [x.get_window_extent() for x in axes]
            right_bounds = [
                x.x0 for x in boxes if x.x0 > box.x0 + 1 and x.y0 < box.y1 and box.y0 < x.y1 + 2 * box.height
            ]
            scale = (min(right_bounds, default=fig.bbox.x1) - box.x0) / box.width
            title.set_fontsize(float(title.get_fontsize()) * min(1, scale))


def drop_overlapping_ticks(axis: Axis, side: int) -> None:
    """Keeps the labels of an axis that do not overlap the last one kept."""
    low, high = sorted(axis.get_view_interval())
    ticks = [x for x in axis.get_major_ticks() if low <= x.get_loc() <= high and x.label1.get_text()]
    if not all(x.label1.get_visible() for x in ticks):  # those of a panel that shares another's
        return
    spans = {x: sorted(x.label1.get_window_extent().get_points()[:, side]) for x in ticks}
    texts, end = dict[Any, str](), -math.inf
    for tick in sorted(ticks, key=lambda x: spans[x][0]):
        fits = spans[tick][0] >= end
        texts[tick.get_loc()] = tick.label1.get_text() if fits else ""
        end = spans[tick][1] if fits else end
    if not all(texts.values()):
        axis.set_ticks(list(texts), list(texts.values()))


def save_figure(
    fig: Figure, file: Path, stamp: Mapping[str, Any], suffixes: Sequence[str] = (".png", ".svg")
) -> list[Path]:
    """Writes FILE.png and FILE.svg with the stamp of the rows they show; returns the paths."""
    origin = (str(stamp.get(key, "")) for key in ("device", "date", "commit"))
    versions = " ".join(f"{key} {stamp[key]}" for key in ("torch", "triton") if key in stamp)
    fig.supxlabel(" | ".join(word for word in (*origin, versions) if word), fontsize=7, color=GRAY, x=0.01, ha="left")
    remove_overlaps(fig)
    file.parent.mkdir(parents=True, exist_ok=True)
    paths = [file.parent / f"{file.name}{suffix}" for suffix in suffixes]
    for path in paths:
        fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)
    return paths
