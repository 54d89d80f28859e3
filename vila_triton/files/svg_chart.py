"""Charts of lines as SVG, drawn without a plotting library."""

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f")
WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 180, 60, 46, 60
MOST_DOTS = 150  # of a line, above which its values have none
Line = tuple[str, str, Sequence[float], str]  # label, color, values at equal distances, dashes
Panel = tuple[str, Sequence[Line], bool]  # title, lines, logarithmic


def draw_chart(titles: Sequence[str], panels: Sequence[Panel], x_name: str) -> str:
    """Draw panels of lines one below the other as the text of an SVG file; `x_name` is what the values are of."""
    drawn = [draw_panel(*panel, x_name, TOP + i * (HEIGHT + GAP)) for i, panel in enumerate(panels)]
    height = TOP + len(panels) * (HEIGHT + GAP)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 160}" height="{height}" '
            'font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            *(f'<text x="10" y="{14 + 16 * i}">{escape(title)}</text>' for i, title in enumerate(titles)),
            *drawn,
            "</svg>\n",
        ]
    )


def draw_panel(title: str, lines: Sequence[Line], log: bool, x_name: str, top: int) -> str:
    """Draw lines over what they are of, with three values of the vertical axis, logarithmic if `log`."""
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
        if len(points) <= MOST_DOTS:
            elements += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>' for x, y in points]
        if name:
            y = top + 26 + 14 * label
            label += 1
            elements.append(f'<text x="{WIDTH + 12}" y="{y}" fill="{color}">{escape(name)}</text>')
    count = max((len(values) for *_, values, _ in lines), default=0)
    elements.append(f'<text x="{LEFT}" y="{top + HEIGHT + 8}">{x_name} 0</text>')
    elements.append(f'<text x="{WIDTH}" y="{top + HEIGHT + 8}" text-anchor="end">{x_name} {max(0, count - 1)}</text>')
    return "\n".join(elements)
