"""The report of a quantization: quantization.json, and quantization.svg, which needs no plotting library."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from vila_triton.files.atomic import write_json

from .awq_scales import SCALE_GROUPS

COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f")
WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 180, 60, 46, 60
Line = tuple[str, str, Sequence[float], str]  # label, color, a value for each layer, dashes


def write_report(folder: Path, summary: dict[str, Any], part_reports: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Write quantization.json and, if there are reports by part, a list of layers each, quantization.svg.

    Of a linear: `rtn_error`, the error of rounding to nearest as a share of its output's energy, on the inputs that
    reach it; `error`, what is left of it; `clip_ratio`, the mean ratio of its grids to the range of their weights. Of a
    scale group: `ratio`, the exponent of its scale.
    """
    reports = {"layers" if part == "llm" else part: list(steps) for part, steps in part_reports.items()}
    write_json(folder / "quantization.json", summary | reports)
    if part_reports:
        (folder / "quantization.svg").write_text(svg_report(summary, part_reports))


def svg_report(summary: dict[str, Any], part_reports: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Draw the reports as an SVG: exponents of the scales, errors and clipping over the layers."""
    layers = part_reports["llm"]
    ratios: list[Line] = [
        (scale_group, color, [layer["scales"].get(scale_group, {}).get("ratio", math.nan) for layer in layers], "")
        for scale_group, color in zip(SCALE_GROUPS, COLORS)
    ]
    charts = [("exponents of the scales", ratios, False)]
    if layers and layers[0]["linears"]:
        charts = [
            ("error, as a share of a linear's output (dashed: rounding to nearest)", error_lines(layers), True),
            *charts,
            ("width of the grids, as a share of the weights' range", clip_ratio_lines(layers), False),
        ]
    charts += [(f"error of {part}", error_lines(steps), True) for part, steps in part_reports.items() if part != "llm"]
    values = {key: value for key, value in summary.items() if key != "work" and not isinstance(value, list | dict)}
    settings = ", ".join(f"{key} {value}" for key, value in values.items() if key != "calibration")
    titles = [settings, f"calibration {values['calibration']}" if "calibration" in values else ""]
    panels = [draw_panel(title, lines, log, TOP + i * (HEIGHT + GAP)) for i, (title, lines, log) in enumerate(charts)]
    height = TOP + len(charts) * (HEIGHT + GAP)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 160}" height="{height}" '
            'font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            *(f'<text x="10" y="{14 + 16 * i}">{escape(title)}</text>' for i, title in enumerate(titles)),
            *panels,
            "</svg>\n",
        ]
    )


def error_lines(steps: Sequence[dict[str, Any]]) -> list[Line]:
    """Two lines for each linear: its error, and dashed the error of rounding to nearest."""
    lines = list[Line]()
    for name, color in zip(steps[0]["linears"], COLORS):
        values = [step["linears"][name] for step in steps]
        lines += [(name, color, [v["error"] for v in values], ""), ("", color, [v["rtn_error"] for v in values], "3 3")]
    return lines


def clip_ratio_lines(steps: Sequence[dict[str, Any]]) -> list[Line]:
    """A line for each linear: the mean ratio of its grids to the range of their weights."""
    named = zip(steps[0]["linears"], COLORS)
    return [(name, color, [step["linears"][name]["clip_ratio"] for step in steps], "") for name, color in named]


def draw_panel(title: str, lines: Sequence[Line], log: bool, top: int) -> str:
    """Draw lines over layers as SVG, with three values of the axis, logarithmic if `log`."""
    finite = [v for *_, values, _ in lines for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    transform: Callable[[float], float] = math.log if log else float
    span = (transform(high) - transform(low)) or 1.0

    def y_of(v: float) -> float:
        return top + 20 + (HEIGHT - 30) * (1 - (transform(v) - transform(low)) / span)

    elements = [f'<text x="{LEFT}" y="{top + 10}" font-weight="bold">{escape(title)}</text>']
    for fraction in (0.0, 0.5, 1.0):
        v = math.exp(transform(low) + fraction * span) if log else low + fraction * span
        y = y_of(v)
        elements.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        elements.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{v:.3g}</text>')
    label = 0
    for name, color, values, dash in lines:
        step = (WIDTH - LEFT) / max(1, len(values) - 1)
        points = [(LEFT + i * step, y_of(v)) for i, v in enumerate(values) if math.isfinite(v) and (v > 0 or not log)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        elements.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-dasharray="{dash}"/>')
        elements += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>' for x, y in points]
        if name:
            y = top + 26 + 14 * label
            label += 1
            elements.append(f'<text x="{WIDTH + 12}" y="{y}" fill="{color}">{escape(name)}</text>')
    count = max((len(values) for *_, values, _ in lines), default=0)
    elements.append(f'<text x="{LEFT}" y="{top + HEIGHT + 8}">layer 0</text>')
    elements.append(f'<text x="{WIDTH}" y="{top + HEIGHT + 8}" text-anchor="end">layer {max(0, count - 1)}</text>')
    return "\n".join(elements)
