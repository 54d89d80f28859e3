"""The figure of training steps: time and memory of ours beside Hugging Face's, without and with checkpointing."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.ticker import EngFormatter

from bench.plots.style import COLORS, GRAY, panels, shared_legend

from .figure import PlottedFigure, Row

PANELS = {  # field: title, unit
    "seconds": ("time of a step", "s"),
    "peak_bytes": ("peak beyond the weights", "B"),
    "kept_bytes": ("kept of a layer for its backward pass", "B"),
}


def plot_training(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """A figure per model and batch: a panel per measure, a bar per runner."""
    figures: dict[Any, list[Row]] = defaultdict(list)
    for row in rows["training"]:
        figures[row["model"], row["layers"], row["batch"], row["tokens"]].append(row)
    for (model, layers, batch, tokens), figure_rows in sorted(figures.items()):
        fields = [field for field in PANELS if any(field in row for row in figure_rows)]
        title = f"A training step of {model}, {layers} layers, {batch} x {tokens} tokens"
        fig, axes = panels(title, [PANELS[field][0] for field in fields], width=3.6, height=0.3 * len(figure_rows) + 1)
        keys = dict.fromkeys((row["weights"], row["checkpointed"], row["choice"]) for row in figure_rows)
        labels = [f"{weights}{', checkpointed' * on}" for weights, on, _ in keys]
        for i, (ax, field) in enumerate(zip(axes, fields)):
            for row in figure_rows:
                is_theirs = row["choice"].startswith("hf")
                y = list(keys).index((row["weights"], row["checkpointed"], row["choice"]))
                color = GRAY if is_theirs else COLORS[0]
                ax.barh(y, row.get(field, 0), 0.8, color=color, label=row["choice"] if is_theirs else "ours")
            ax.set_yticks(range(len(keys)), labels if i == 0 else [""] * len(keys), fontsize=8)
            ax.invert_yaxis()
            ax.xaxis.set_major_formatter(EngFormatter(PANELS[field][1]))
            ax.tick_params(axis="x", labelsize=8)
            ax.grid(axis="y", visible=False)
        shared_legend(fig, axes)
        yield PlottedFigure(f"training-{model}-{layers}-layers-{batch}x{tokens}", fig, figure_rows)
