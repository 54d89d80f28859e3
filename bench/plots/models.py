"""Pictures of whole models: times and memory as measured, and the bounds on paper."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from bench.plots.style import COLOURS, GREY, figure, legend, panels, sizes_axis, unit_axis

from .figure import Picture, Row

LINES = ["-", "--", ":", "-."]
BARS = {"float16": COLOURS[5], "int4": COLOURS[0]}


def memory(rows: Mapping[str, Sequence[Row]]) -> Iterator[Picture]:
    """Bytes beyond parameters and cache against the length of a prompt, in one pass and in chunks."""
    shown = rows["memory"]
    fig, ax = figure("Peak activation memory of a prefill", 8.5, 4.2)
    lines: dict[Any, list[Row]] = defaultdict(list)
    for row in shown:
        lines[row["choice"], row["layers"], row["chunk"]].append(row)
    for (choice, layers, chunk), found in sorted(lines.items()):
        name = f"{'one pass' if chunk == 0 else f'chunks of {chunk}'}, {choice}, {layers} layers"
        curve(ax, found, "length", lambda row: row["peak"] / 2**20, label=name, marker=".")
    for layers, style in zip(sorted({row["layers"] for row in shown}), LINES[1:] * len(shown)):
        mine = [row for row in shown if row["layers"] == layers]
        name = f"the cache, {layers} layers"
        curve(ax, mine, "length", lambda row: row["cache"] / 2**20, label=name, color=GREY, linestyle=style)
    sizes_axis(ax, [row["length"] for row in shown])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(EngFormatter("MiB"))
    ax.set_xlabel("tokens of the prompt")
    ax.set_ylabel("beyond parameters and cache")
    legend(fig, [ax])
    yield Picture("memory", fig, shown)


def curve(ax: Axes, rows: Sequence[Row], x: str, y: Callable[[Row], float], **style: Any) -> None:
    points = sorted({(row[x], y(row)) for row in rows})
    ax.plot(*zip(*points), **style)


def model(rows: Mapping[str, Sequence[Row]]) -> Iterator[Picture]:
    """First token, streaming, decode and memory of one model, a line for each kind of weights and kernel choice."""
    models: dict[Any, list[Row]] = defaultdict(list)
    for row in rows["model"]:
        models[row["model"], row["layers"]].append(row)
    for (name, layers), found in sorted(models.items()):
        plots = list(parts(found))
        fig, axes = panels(f"{name}, {layers} layers of its language model", [title for title, *_ in plots], width=4)
        weights = sorted({row["weights"] for row in found})
        choices = sorted(
            {row["choice"] for row in found}, key=lambda choice: (choice.startswith("hf"), choice != "default", choice)
        )
        colours = {c: GREY if c.startswith("hf") else COLOURS[i % len(COLOURS)] for i, c in enumerate(choices)}
        for ax, (_, shown, x, y, unit) in zip(axes, plots):
            for choice in choices:
                for w, style in zip(weights, LINES):
                    mine = [row for row in shown if (row["choice"], row["weights"]) == (choice, w)]
                    if mine:
                        look = {"color": colours[choice], "linestyle": style, "marker": "."}
                        curve(ax, mine, x, y, label=f"{choice}, {w}", **look)
            sizes_axis(ax, [row[x] for row in shown])
            if x in ("context", "batch"):
                limits(ax, shown, x, dict(zip(weights, LINES)))
                ax.set_yscale("log")
                unit_axis(ax.yaxis, None)
            else:
                ax.set_ylim(bottom=0)
                ax.yaxis.set_major_formatter(EngFormatter(unit))
            ax.set_xlabel({"batch": "sequences"}.get(x, f"tokens of the {x}"))
        legend(fig, axes)
        yield Picture(f"model-{name}-{layers}-layers", fig, found)


def parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row], str, Callable[[Row], float], str]]:
    """(title, rows, what lies along x, what along y, unit) of each panel that has rows."""
    for what, title, x, y, unit in (
        ("prefill", "time to the first token", "prompt", "seconds", "s"),
        ("stream", "time to the first token of a new turn", "history", "seconds", "s"),
        ("memory", "peak memory of a prefill", "prompt", "peak_bytes", "B"),
    ):
        for batch, found in split(rows, what, "batch"):
            yield f"{title}{f', batch {batch}' * (batch != 1)}", found, x, lambda row, y=y: row[y], unit
    for batch, found in split(rows, "decode", "batch"):
        yield f"decode, tokens a second, batch {batch}", found, "context", lambda row: row["tokens_per_s"], ""
    for context, found in split(rows, "decode", "context")[:1]:
        if len({row["batch"] for row in found}) > 1:
            yield f"decode, tokens a second, context {context}", found, "batch", lambda row: row["tokens_per_s"], ""


def split(rows: Sequence[Row], what: str, by: str) -> list[tuple[Any, list[Row]]]:
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row["what"] == what:
            found[row[by]].append(row)
    return sorted(found.items())


def not_hf(row: Row) -> bool:
    """Whether the limit of a row is that of the weights it names; Hugging Face's stand-in for int4 is dense."""
    return not row["choice"].startswith("hf")


def limits(ax: Axes, rows: Sequence[Row], x: str, styles: Mapping[str, str]) -> None:
    """Tokens a second if reading weights and cache were all: the memory-bound limit."""
    for weights, style in styles.items():
        mine = [row for row in rows if row["weights"] == weights and row.get("limit_seconds") and not_hf(row)]
        if mine:
            style = {"label": f"limit of memory, {weights}", "color": "black", "linewidth": 0.8, "linestyle": style}
            curve(ax, mine, x, lambda row: row["batch"] / row["limit_seconds"], **style)


def predict(rows: Mapping[str, Sequence[Row]]) -> Iterator[Picture]:
    """Least times on paper, a panel for each machine and length, a bar for each model and kind of weights."""
    for what, length, title in (
        ("prefill", "prompt", "Least time to the first token, ms"),
        ("decode", "context", "Least time of a new token, ms"),
    ):
        shown = [row for row in rows["predict"] if row["what"] == what]
        gpus = list(dict.fromkeys(row["gpu"] for row in shown))
        models = list(dict.fromkeys(row["model"] for row in shown))
        places = [(value, gpu) for value in sorted({row[length] for row in shown}) for gpu in gpus]
        if not places:
            continue
        found = [[row for row in shown if (row[length], row["gpu"]) == place] for place in places]
        names = [heading(mine, length) for mine in found]
        fig, axes = panels(f"{title}: bounds, not measurements", names, len(gpus), 3.0, 2.3, sharey=True)
        for ax, mine in zip(axes, found):
            bars(ax, mine, models)
        legend(fig, axes)
        yield Picture(f"predict-{what}", fig, shown)


def heading(rows: Sequence[Row], length: str) -> str:
    """H100: 1 picture, 32 words."""
    row = rows[0]
    where = f"at {row[length]} tokens"
    if length == "prompt":
        where = f"{row['pictures']} picture{'s' * (row['pictures'] != 1)}, {row['prompt']} words"
    return f"{row['gpu']}{' as measured' * row['source'].startswith('measured')}: {where}"


def bars(ax: Axes, rows: Sequence[Row], models: Sequence[str]) -> None:
    """Milliseconds as bars, the number beside each; in place of a bar why there is none."""
    longest = max((row["seconds"] * 1e3 for row in rows if not row["beyond"]), default=1)
    kinds = [weights for weights in BARS if any(row["weights"] == weights for row in rows)]
    for k, weights in enumerate(kinds):
        for row in (row for row in rows if row["weights"] == weights):
            y = models.index(row["model"]) + (k - (len(kinds) - 1) / 2) * 0.38
            ms = 0 if row["beyond"] else row["seconds"] * 1e3
            ax.barh(y, ms, 0.36, color=BARS[weights], label=weights)
            text = f"beyond {row['beyond']}" if row["beyond"] else f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f}"
            ax.text(ms + 0.02 * longest, y, text, va="center", fontsize=7, color=GREY if row["beyond"] else "black")
    ax.set_yticks(range(len(models)), models, fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.set_ylim(len(models) - 0.4, -0.6)
    ax.set_xlim(0, 1.2 * longest)
    ax.grid(axis="y", visible=False)
