"""Figures of whole models: times and memory as measured, and lower bounds on paper."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from bench.plots.style import COLORS, GRAY, format_size_axis, format_unit_axis, new_figure, panels, shared_legend

from .figure import PlottedFigure, Row

LINE_STYLES = ["-", "--", ":", "-."]
BAR_COLORS = {"float16": COLORS[5], "int4": COLORS[0]}


def plot_memory(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """Bytes beyond parameters and cache against the length of a prompt, in one pass and in chunks."""
    memory_rows = rows["memory"]
    fig, ax = new_figure("Peak activation memory of a prefill", 8.5, 4.2)
    lines: dict[Any, list[Row]] = defaultdict(list)
    for row in memory_rows:
        lines[row["choice"], row["layers"], row["chunk"]].append(row)
    for (choice, layers, chunk), line_rows in sorted(lines.items()):
        name = f"{'one pass' if chunk == 0 else f'chunks of {chunk}'}, {choice}, {layers} layers"
        draw_curve(ax, line_rows, "length", lambda row: row["peak"] / 2**20, label=name, marker=".")
    for layers, style in zip(sorted({row["layers"] for row in memory_rows}), LINE_STYLES[1:] * len(memory_rows)):
        layer_rows = [row for row in memory_rows if row["layers"] == layers]
        name = f"the cache, {layers} layers"
        draw_curve(ax, layer_rows, "length", lambda row: row["cache"] / 2**20, label=name, color=GRAY, linestyle=style)
    format_size_axis(ax, [row["length"] for row in memory_rows])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(EngFormatter("MiB"))
    ax.set_xlabel("tokens of the prompt")
    ax.set_ylabel("beyond parameters and cache")
    shared_legend(fig, [ax])
    yield PlottedFigure("memory", fig, memory_rows)


def draw_curve(ax: Axes, rows: Sequence[Row], x: str, y: Callable[[Row], float], **style: Any) -> None:
    """Draws y against x, each point once."""
    points = sorted({(row[x], y(row)) for row in rows})
    ax.plot(*zip(*points), **style)


def plot_model(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """First token, streaming, decode and memory of one model, a line for each weight format and choice of kernels."""
    models: dict[Any, list[Row]] = defaultdict(list)
    for row in rows["model"]:
        models[row["model"], row["layers"]].append(row)
    for (name, layers), model_rows in sorted(models.items()):
        plots = list(panel_data(model_rows))
        fig, axes = panels(f"{name}, {layers} layers of its language model", [title for title, *_ in plots], width=4)
        weights = sorted({row["weights"] for row in model_rows})
        choices = sorted(
            {row["choice"] for row in model_rows},
            key=lambda choice: (choice.startswith("hf"), choice != "default", choice),
        )
        colors = {c: GRAY if c.startswith("hf") else COLORS[i % len(COLORS)] for i, c in enumerate(choices)}
        for ax, (_, panel_rows, x, y, unit) in zip(axes, plots):
            for choice in choices:
                for w, style in zip(weights, LINE_STYLES):
                    line_rows = [row for row in panel_rows if (row["choice"], row["weights"]) == (choice, w)]
                    if line_rows:
                        line_style = {"color": colors[choice], "linestyle": style, "marker": "."}
                        draw_curve(ax, line_rows, x, y, label=f"{choice}, {w}", **line_style)
            format_size_axis(ax, [row[x] for row in panel_rows])
            if x in ("context", "batch"):
                draw_limits(ax, panel_rows, x, dict(zip(weights, LINE_STYLES)))
                ax.set_yscale("log")
                format_unit_axis(ax.yaxis, None)
            else:
                ax.set_ylim(bottom=0)
                ax.yaxis.set_major_formatter(EngFormatter(unit))
            ax.set_xlabel({"batch": "sequences"}.get(x, f"tokens of the {x}"))
        shared_legend(fig, axes)
        yield PlottedFigure(f"model-{name}-{layers}-layers", fig, model_rows)


def panel_data(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row], str, Callable[[Row], float], str]]:
    """Yields (title, rows, field of the x axis, y of a row, unit) of each panel that has rows."""
    for step_kind, title, x, y, unit in (
        ("prefill", "time to the first token", "prompt", "seconds", "s"),
        ("streaming", "time to the first token of a new turn", "history", "seconds", "s"),
        ("memory", "peak memory of a prefill", "prompt", "peak_bytes", "B"),
    ):
        for batch, panel_rows in group_rows(rows, step_kind, "batch"):
            yield f"{title}{f', batch {batch}' * (batch != 1)}", panel_rows, x, lambda row, y=y: row[y], unit
    for batch, panel_rows in group_rows(rows, "decode", "batch"):
        yield f"decode, tokens a second, batch {batch}", panel_rows, "context", lambda row: row["tokens_per_s"], ""
    for context, panel_rows in group_rows(rows, "decode", "context")[:1]:
        if len({row["batch"] for row in panel_rows}) > 1:
            yield (
                f"decode, tokens a second, context {context}",
                panel_rows,
                "batch",
                lambda row: row["tokens_per_s"],
                "",
            )


def group_rows(rows: Sequence[Row], step_kind: str, by: str) -> list[tuple[Any, list[Row]]]:
    """Returns the rows of one kind of step by the value of a field, in its order."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row["what"] == step_kind:
            groups[row[by]].append(row)
    return sorted(groups.items())


def has_exact_limit(row: Row) -> bool:
    """Returns whether a row's limit is that of the weights it names: Hugging Face's stand-in for int4
    is dequantized.
    """
    return not row["choice"].startswith("hf")


def draw_limits(ax: Axes, rows: Sequence[Row], x: str, styles: Mapping[str, str]) -> None:
    """Draws the tokens per second if reading weights and cache were the only cost: the memory-bound limit."""
    for weights, style in styles.items():
        line_rows = [
            row for row in rows if row["weights"] == weights and row.get("limit_seconds") and has_exact_limit(row)
        ]
        if line_rows:
            style = {"label": f"limit of memory, {weights}", "color": "black", "linewidth": 0.8, "linestyle": style}
            draw_curve(ax, line_rows, x, lambda row: row["batch"] / row["limit_seconds"], **style)


def plot_bounds(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """Least times on paper, a panel for each machine and length, a bar for each model and weight format."""
    for step_kind, length, title in (
        ("prefill", "prompt", "Least time to the first token, ms"),
        ("decode", "context", "Least time of a new token, ms"),
    ):
        step_rows = [row for row in rows["predict"] if row["what"] == step_kind]
        gpus = list(dict.fromkeys(row["gpu"] for row in step_rows))
        models = list(dict.fromkeys(row["model"] for row in step_rows))
        panel_keys = [(value, gpu) for value in sorted({row[length] for row in step_rows}) for gpu in gpus]
        if not panel_keys:
            continue
        panel_rows = [[row for row in step_rows if (row[length], row["gpu"]) == key] for key in panel_keys]
        names = [panel_title(bar_rows, length) for bar_rows in panel_rows]
        fig, axes = panels(f"{title}: bounds, not measurements", names, len(gpus), 3.0, 2.3, sharey=True)
        for ax, mine in zip(axes, panel_rows):
            draw_bars(ax, mine, models)
        shared_legend(fig, axes)
        yield PlottedFigure(f"predict-{step_kind}", fig, step_rows)


def panel_title(rows: Sequence[Row], length: str) -> str:
    """Returns a title such as "H100: 1 image, 32 text tokens"."""
    row = rows[0]
    step_label = f"at {row[length]} tokens"
    if length == "prompt":
        step_label = f"{row['images']} image{'s' * (row['images'] != 1)}, {row['prompt']} text tokens"
    return f"{row['gpu']}{' as measured' * row['source'].startswith('measured')}: {step_label}"


def draw_bars(ax: Axes, rows: Sequence[Row], models: Sequence[str]) -> None:
    """Draws milliseconds as bars, with the number beside each, or the reason why there is none."""
    longest = max((row["seconds"] * 1e3 for row in rows if not row["beyond"]), default=1)
    formats = [weights for weights in BAR_COLORS if any(row["weights"] == weights for row in rows)]
    for k, weights in enumerate(formats):
        for row in (row for row in rows if row["weights"] == weights):
            y = models.index(row["model"]) + (k - (len(formats) - 1) / 2) * 0.38
            ms = 0 if row["beyond"] else row["seconds"] * 1e3
            ax.barh(y, ms, 0.36, color=BAR_COLORS[weights], label=weights)
            text = f"beyond {row['beyond']}" if row["beyond"] else f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f}"
            ax.text(ms + 0.02 * longest, y, text, va="center", fontsize=7, color=GRAY if row["beyond"] else "black")
    ax.set_yticks(range(len(models)), models, fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.set_ylim(len(models) - 0.4, -0.6)
    ax.set_xlim(0, 1.2 * longest)
    ax.grid(axis="y", visible=False)
