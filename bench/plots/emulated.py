"""The figure of `bench.emulate`: the source lines of each kernel, with bars of the instructions they became."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..compiler.inspect_plot import KIND_COLORS, RED
from ..emulator.counters.text import format_per_unit, format_sector_counts, format_wavefronts, is_marked, source_text
from .style import GRAY, new_figure, save_figure

Row = Mapping[str, Any]
MAX_NOTES = 2  # accesses of memory beside the bar of a line, marked ones first


def plot_source_lines(rows: Sequence[Row], file: Path, count: int) -> list[Path]:
    """Draws, for each row of kind "emulate", its `count` source lines with the most instructions and those that touch
    memory, in the order of the file: instructions by kind as shares of the kernel's, and beside them what memory does.
    Returns the files.
    """
    if not rows:
        raise ValueError("nothing was emulated, so there is nothing to draw")
    shown = [(row, shown_lines(row, count)) for row in rows]
    height = 1.2 + 0.26 * sum(len(lines) + 2.5 for _, lines in shown)
    fig, ax = new_figure(f"{rows[0]['op']}: what its source lines became", width=13, height=height)
    longest = max(line_share(row, line) for row, lines in shown for line in lines)
    y, positions, labels = -0.5, [], []
    for row, lines in shown:
        y += 2.0
        ax.text(0, y, kernel_label(row), fontsize=8.5, fontweight="bold", va="center")
        for line in lines:
            y += 1.0
            positions.append(y)
            labels.append(f"{source_text(line)[:56]}   {line}")
            draw_line(ax, y, row, line, longest)
    ax.set_yticks(positions, labels, fontsize=7, family="monospace")
    ax.grid(visible=False, axis="y")
    ax.set_ylim(y + 0.8, 0.5)
    ax.set_xlim(0, 1.7 * longest)
    ax.set_xlabel("% of the instructions (PTX) that the kernel's warps issue")
    kinds = [kind for kind in KIND_COLORS if any(kind in row["kinds"] for row in rows)]
    handles = [Patch(color=KIND_COLORS[kind], label=kind) for kind in kinds]
    fig.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    sizes = " ".join(f"{name}={size}" for name, size in rows[0]["sizes"].items())
    return save_figure(fig, file, {**rows[0], "device": f"emulated; sizes: {rows[0]['case']} {sizes}"})


def kernel_label(row: Row) -> str:
    """Returns the heading of a kernel's lines."""
    source = f"{row['source']}: " if row["source"] else ""
    heading = f"{source}{row['impl']} {row['number']} {row['target']}: {row['kernel']}"
    return f"{heading}, instructions: {format_per_unit(row)}"


def shown_lines(row: Row, count: int) -> list[str]:
    """Returns the source lines to draw, by file and number."""
    chosen = {*list(row["lines"])[:count], *(x["source"] for x in row["memory"])}
    return sorted(chosen & row["lines"].keys(), key=lambda line: (line.split(":")[0], int(line.split(":")[1])))


def line_share(row: Row, line: str) -> float:
    """Returns the share of a kernel's instructions that stand on a source line, in percent."""
    return 100 * sum(row["lines"][line].values()) / row["instructions"]


def draw_line(ax: Axes, y: float, row: Row, line: str, longest: float) -> None:
    """Draws the bar of a source line, and what its accesses of memory did; in red what is marked."""
    left = 0.0
    for kind in KIND_COLORS:
        width = 100 * row["lines"][line].get(kind, 0) / row["instructions"]
        ax.barh(y, width, left=left, color=KIND_COLORS[kind], height=0.8)
        left += width
    accesses = sorted((x for x in row["memory"] if x["source"] == line), key=is_marked, reverse=True)
    note = ax.text(left, y, " ", va="center", fontsize=7)
    for x in accesses[:MAX_NOTES]:
        sectors = f", {format_sector_counts(x)} sectors" if x["requests"] else ""
        wavefronts = f", {format_wavefronts(x)} wavefronts" if x["accesses"] else ""
        note = ax.annotate(
            f"  {x['opcode']}{sectors}{wavefronts}",
            xy=(1, 0.5),
            xycoords=note,  # at the end of the note before it
            va="center",
            fontsize=7,
            color=RED if is_marked(x) else GRAY,
        )
        note.set_in_layout(False)
