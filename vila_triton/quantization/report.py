"""The report of a quantization: quantization.json, and quantization.svg, which needs no plotting library."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_triton.files.atomic import write_json
from vila_triton.files.svg_chart import COLORS, Line, Panel, draw_chart

from .awq_scales import SCALE_GROUPS


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
    charts: list[Panel] = [("exponents of the scales", ratios, False)]
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
    return draw_chart(titles, charts, "layer")


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
