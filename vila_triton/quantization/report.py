"""What was done to each layer, as JSON and as a picture (SVG, written by hand: nothing more need be installed)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from vila_triton.checkpoints.shard_writer import write_json

from .awq_scales import PLACES

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f")
WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 180, 60, 46, 60
Line = tuple[str, str, Sequence[float], str]  # label, colour, a value a layer, dashes


def write(folder: Path, about: dict[str, Any], parts: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """quantization.json and, of reports by part, a list of steps each, quantization.svg.

    Of a linear: `nearest`, the share of its output's square that rounding to the nearest level would lose on the inputs
    that it gets; `ours`, the share that is lost; `shrink`, the mean width of its grids, 1 unclipped. Of a place:
    `ratio`, the exponent of its scale.
    """
    said = {"layers" if part == "llm" else part: list(steps) for part, steps in parts.items()}
    write_json(folder / "quantization.json", about | said)
    if parts:
        (folder / "quantization.svg").write_text(picture(about, parts))


def picture(about: dict[str, Any], parts: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    layers = parts["llm"]
    ratios: list[Line] = [
        (place, colour, [layer["scales"].get(place, {}).get("ratio", math.nan) for layer in layers], "")
        for place, colour in zip(PLACES, COLOURS)
    ]
    shown = [("exponents of the scales", ratios, False)]
    if layers and layers[0]["linears"]:
        shown = [
            ("error, as a share of a linear's output (dashed: to the nearest level)", errors(layers), True),
            *shown,
            ("width of the grids, as a share of the weights' range", widths(layers), False),
        ]
    for part in parts:
        if part != "llm":
            shown.append((f"error of {part}", errors(parts[part]), True))
    said = [f"{key} {value}" for key, value in about.items() if key != "work" and not isinstance(value, list | dict)]
    heads = [", ".join(words for words in said if words.startswith("calibration") is of) for of in (False, True)]
    panels = [panel(head, lines, log, TOP + i * (HEIGHT + GAP)) for i, (head, lines, log) in enumerate(shown)]
    height = TOP + len(shown) * (HEIGHT + GAP)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 160}" height="{height}" '
            'font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            *(f'<text x="10" y="{14 + 16 * i}">{escape(head)}</text>' for i, head in enumerate(heads)),
            *panels,
            "</svg>\n",
        ]
    )


def errors(steps: Sequence[dict[str, Any]]) -> list[Line]:
    """Two lines a linear: what is lost, and dashed what the nearest level would lose."""
    lines = list[Line]()
    for name, colour in zip(steps[0]["linears"], COLOURS):
        values = [step["linears"][name] for step in steps]
        lines += [(name, colour, [v["ours"] for v in values], ""), ("", colour, [v["nearest"] for v in values], "3 3")]
    return lines


def widths(steps: Sequence[dict[str, Any]]) -> list[Line]:
    """The widths of a linear's grids."""
    named = zip(steps[0]["linears"], COLOURS)
    return [(name, colour, [step["linears"][name]["shrink"] for step in steps], "") for name, colour in named]


def panel(head: str, lines: Sequence[Line], log: bool, top: int) -> str:
    """Lines over layers, with three values named at the side."""
    real = [v for *_, values, _ in lines for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(real), max(real)) if real else (0.0, 1.0)
    way: Callable[[float], float] = math.log if log else float
    span = (way(high) - way(low)) or 1.0

    def place(v: float) -> float:
        return top + 20 + (HEIGHT - 30) * (1 - (way(v) - way(low)) / span)

    out = [f'<text x="{LEFT}" y="{top + 10}" font-weight="bold">{escape(head)}</text>']
    for share in (0.0, 0.5, 1.0):
        v = math.exp(way(low) + share * span) if log else low + share * span
        y = place(v)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{v:.3g}</text>')
    label = 0
    for name, colour, values, dash in lines:
        step = (WIDTH - LEFT) / max(1, len(values) - 1)
        points = [(LEFT + i * step, place(v)) for i, v in enumerate(values) if math.isfinite(v) and (v > 0 or not log)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in points]
        if name:
            y = top + 26 + 14 * label
            label += 1
            out.append(f'<text x="{WIDTH + 12}" y="{y}" fill="{colour}">{escape(name)}</text>')
    count = max((len(values) for *_, values, _ in lines), default=0)
    out.append(f'<text x="{LEFT}" y="{top + HEIGHT + 8}">layer 0</text>')
    out.append(f'<text x="{WIDTH}" y="{top + HEIGHT + 8}" text-anchor="end">layer {max(0, count - 1)}</text>')
    return "\n".join(out)
