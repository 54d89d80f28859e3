"""What `inspect` found, as a picture: for every kernel what the instructions of its main loop are for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..plots.style import COLOURS, figure, save
from .disassembly import BARRIER, CONVERT, FLOAT, GLOBAL, INTEGER, REST, SHARED, SPECIAL, SPILL, TENSOR

BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, BLACK = COLOURS
COLOUR = {
    TENSOR: BLUE,
    FLOAT: SKY,
    SPECIAL: PINK,
    CONVERT: ORANGE,
    INTEGER: YELLOW,
    GLOBAL: GREEN,
    SHARED: "#7FCFB9",
    SPILL: RED,
    BARRIER: BLACK,
    REST: "#BBBBBB",
}


def draw(found: Sequence[Mapping[str, Any]], file: Path) -> list[Path]:
    """One bar a row of kind "inspect": the main loop's instructions by kind, and beside it what the kernel takes.

    Where every row knows its weights or scores, a bar is as long as its instructions for each of them.
    """
    if not found:
        raise ValueError("nothing was compiled, so there is nothing to draw")
    units = {row["unit"] for row in found}
    per_unit = all(row["per_unit"] for row in found) and len(units) == 1
    lengths = [row["per_unit"] if per_unit else row["loops"][0]["instructions"] for row in found]
    fig, ax = figure(f"{found[0]['op']}: what the main loop does", width=13, height=1.4 + 0.34 * len(found))
    places, y, above = [], 0.0, None
    for row, length in zip(found, lengths):
        group = row["source"], row["impl"], row["number"]
        y += 1.0 if above in (None, group) else 1.6
        above = group
        places.append(y)
        bar(ax, y, row, length, max(lengths))
    ax.set_yticks(places, [label(row) for row in found], fontsize=8)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(y=0.02)
    ax.set_xlim(0, 1.9 * max(lengths))
    what = f"all threads' instructions a {found[0]['unit']}" if per_unit else "instructions of a thread in one pass"
    ax.set_xlabel(f"{what}, main loop")
    shown = [kind for kind in COLOUR if any(kind in row["loops"][0]["mix"] for row in found)]
    handles = [Patch(color=COLOUR[kind], label=kind) for kind in shown]
    fig.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    case = f"compiled, not run; sizes: {found[0]['case']} {' '.join(f'{k}={v}' for k, v in found[0]['sizes'].items())}"
    return save(fig, file, {**found[0], "device": case})


def label(row: Mapping[str, Any]) -> str:
    blocks = [f"{k.removeprefix('BLOCK_')}={v}" for k, v in row["config"].items() if k.startswith("BLOCK_")]
    source = f"{row['source']}: " if row["source"] else ""
    return f"{source}{row['impl']} {row['number']} ({' '.join(blocks)})  {row['target']}"


def bar(ax: Axes, y: float, row: Mapping[str, Any], length: float, longest: float) -> None:
    """Numbers in a bar are instructions of a thread; the one after it is the length of the bar."""
    loop = row["loops"][0]
    left = 0.0
    for kind in COLOUR:
        n = loop["mix"].get(kind, 0)
        width = length * n / loop["instructions"]
        ax.barh(y, width, left=left, color=COLOUR[kind], height=0.8)
        if width >= 0.02 * longest:
            dark = kind in (TENSOR, BARRIER, SPILL, GLOBAL)
            middle = left + width / 2
            ax.text(middle, y, str(n), ha="center", va="center", fontsize=7, color="w" if dark else "k")
        left += width
    note = f"{length:.3g}   {row['registers']} registers, {row['shared'] / 1024:.3g} KiB, "
    note += f"{row['warps']} warps ({row['occupancy']:.0%}, limit: {row['limit']})"
    note += f", spills {row['spills']}" if row["spills"] else ""
    ax.text(left, y, f"  {note}", va="center", fontsize=7.5, color=RED if row["spills"] else "k")
