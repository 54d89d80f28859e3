"""A self-contained HTML page: tables, marks, and plots as inline SVG."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { --ink: #1b1f24; --soft: #5d6772; --line: #e3e6ea; --good: #00734f; --bad: #b3400a; --none: #7a7f86; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 72rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p.stamp, p.note { color: var(--soft); margin: .2rem 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; margin: .4rem 0; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--ink); white-space: nowrap; }
th, td { padding: .22rem .9rem .22rem 0; vertical-align: top; } td { border-bottom: 1px solid var(--line); }
th.n, td.n { text-align: right; white-space: nowrap; }
tr.ours td { font-weight: 600; }
.mark { font-weight: 600; white-space: nowrap; } .good { color: var(--good); } .bad { color: var(--bad); } .none { color: var(--none); }
img { max-width: 100%; margin: .6rem 0; } pre { font-size: .78rem; overflow-x: auto; } summary { cursor: pointer; color: var(--soft); }
"""  # noqa: E501


class Html(str):
    """Text that is HTML and not to be escaped."""


def mark(text: str, style: str) -> Html:
    """Text in the color of a style: good, bad or none."""
    return Html(f'<span class="mark {style}">{escape(text)}</span>')


def html_cell(value: str) -> str:
    """Returns HTML as it is, and other text escaped."""
    return value if isinstance(value, Html) else escape(value)


def table(
    head: Sequence[str], lines: Iterable[Sequence[str]], numbers: str = "", highlighted: Iterable[int] = ()
) -> Html:
    """numbers: a letter for each column, n if it holds numbers. highlighted: the indices of lines in bold type."""
    classes = [' class="n"' if column == "n" else "" for column in numbers.ljust(len(head), "-")]
    out = [
        '<div class="wide"><table><tr>',
        *(f"<th{k}>{html_cell(name)}</th>" for k, name in zip(classes, head)),
        "</tr>",
    ]
    strong = set(highlighted)
    for i, line in enumerate(lines):
        out.append('\n<tr class="ours">' if i in strong else "\n<tr>")
        out += [f"<td{k}>{html_cell(value)}</td>" for k, value in zip(classes, line, strict=True)]
        out.append("</tr>")
    return Html("".join([*out, "</table></div>"]))


def heading(level: int, text: str) -> Html:
    """Returns a heading of a level from 1, the largest, to 6; the text is escaped."""
    return Html(f"<h{level}>{escape(text)}</h{level}>")


def paragraph(text: str, style: str = "note") -> Html:
    """Returns a paragraph whose CSS class is `style`; the text is escaped unless it is HTML."""
    return Html(f'<p class="{style}">{html_cell(text)}</p>')


def details(title: str, text: str) -> Html:
    """Text that unfolds when the title is clicked."""
    return Html(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")


def svg_image(svg: bytes, name: str) -> Html:
    """Returns an image with the bytes of an SVG file inline, and a name for readers who do not see it."""
    return Html(f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{b64encode(svg).decode()}">')


def page(title: str, parts: Iterable[Html]) -> str:
    """Returns a whole HTML document of these parts, with its style sheet inline."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
