"""The figure of `bench.inspect`: for every kernel, the purpose of the instructions in its main loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..plots.style import COLORS, new_figure, save_figure
from .disassembly import BARRIER, CONVERT, FLOAT, GLOBAL, INTEGER, OTHER, SHARED, SPECIAL, SPILL, TENSOR

BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, BLACK = COLORS
KIND_COLORS = {
    TENSOR: BLUE,
    FLOAT: SKY,
    SPECIAL: PINK,
    CONVERT: ORANGE,
    INTEGER: YELLOW,
    GLOBAL: GREEN,
    SHARED: "#7FCFB9",
    SPILL: RED,
    BARRIER: BLACK,
    OTHER: "#BBBBBB",
}


def plot_main_loops(kernel_rows: Sequence[Mapping[str, Any]], file: Path) -> list[Path]:
    """Draws one bar per row of kind "inspect": the main loop's instructions by kind, and beside it the kernel's
    resources.

    If every row knows its weights or scores, the length of a bar is the instructions for each of them. Returns the
    files.
    """
    if not kernel_rows:
        raise ValueError("nothing was compiled, so there is nothing to draw")
    units = {row["unit"] for row in kernel_rows}
    per_unit = all(row["per_unit"] for row in kernel_rows) and len(units) == 1
    lengths = [row["per_unit"] if per_unit else row["loops"][0]["instructions"] for row in kernel_rows]
    fig, ax = new_figure(
        f"{kernel_rows[0]['op']}: what the main loop does", width=13, height=1.4 + 0.34 * len(kernel_rows)
    )
    positions, y, previous_group = [], 0.0, None
    for row, length in zip(kernel_rows, lengths):
        group = row["source"], row["impl"], row["number"]
        y += 1.0 if previous_group in (None, group) else 1.6
        previous_group = group
        positions.append(y)
        draw_bar(ax, y, row, length, max(lengths))
    ax.set_yticks(positions, [row_label(row) for row in kernel_rows], fontsize=8)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(y=0.02)
    ax.set_xlim(0, 1.9 * max(lengths))
    unit_label = (
        f"all threads' instructions a {kernel_rows[0]['unit']}" if per_unit else "instructions of a thread in one pass"
    )
    ax.set_xlabel(f"{unit_label}, main loop")
    kinds = [kind for kind in KIND_COLORS if any(kind in row["loops"][0]["mix"] for row in kernel_rows)]
    handles = [Patch(color=KIND_COLORS[kind], label=kind) for kind in kinds]
    fig.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    first = kernel_rows[0]
    sizes = " ".join(f"{name}={size}" for name, size in first["sizes"].items())
    return save_figure(fig, file, {**first, "device": f"compiled, not run; sizes: {first['case']} {sizes}"})


def row_label(row: Mapping[str, Any]) -> str:
    """Returns implementation, number, block sizes and target of a row."""
    blocks = [f"{k.removeprefix('BLOCK_')}={v}" for k, v in row["config"].items() if k.startswith("BLOCK_")]
    source = f"{row['source']}: " if row["source"] else ""
    return f"{source}{row['impl']} {row['number']} ({' '.join(blocks)})  {row['target']}"


def draw_bar(ax: Axes, y: float, row: Mapping[str, Any], length: float, longest: float) -> None:
    """Draws one bar. The numbers in it are instructions of a thread; the number after it is the length of the bar."""
    loop = row["loops"][0]
    left = 0.0
    for kind in KIND_COLORS:
        n = loop["mix"].get(kind, 0)
        width = length * n / loop["instructions"]
        ax.barh(y, width, left=left, color=KIND_COLORS[kind], height=0.8)
        if width >= 0.02 * longest:
            dark_background = kind in (TENSOR, BARRIER, SPILL, GLOBAL)
            middle = left + width / 2
            ax.text(middle, y, str(n), ha="center", va="center", fontsize=7, color="w" if dark_background else "k")
        left += width
    note = f"{length:.3g}   {row['registers']} registers, {row['shared'] / 1024:.3g} KiB, "
    note += f"{row['warps']} warps ({row['occupancy']:.0%}, limit: {row['limit']})"
    note += f", spills {row['spills']}" if row["spills"] else ""
    ax.text(left, y, f"  {note}", va="center", fontsize=7.5, color=RED if row["spills"] else "k")
