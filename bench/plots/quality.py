"""The figure of quantization: the divergence of int4 from the float model, by method and group size."""

from collections.abc import Iterator, Mapping, Sequence

from bench.plots.style import COLORS, GRAY, panels, shared_legend

from .figure import PlottedFigure, Row

METHOD_COLORS = {"rtn": GRAY, "llm-awq": COLORS[1], "awq-gptq": COLORS[0]}


def plot_quality(rows: Mapping[str, Sequence[Row]]) -> Iterator[PlottedFigure]:
    """A panel per model: KL per token on a log scale, a bar for each method at each group size."""
    int4_rows = [row for row in rows["quality"] if row["group"]]
    models = list(dict.fromkeys(row["model"] for row in int4_rows))
    fig, axes = panels("KL(float32 ‖ int4) a token, in nats", models, width=4)
    for ax, model in zip(axes, models):
        groups = sorted({row["group"] for row in int4_rows if row["model"] == model})
        for i, (method, color) in enumerate(METHOD_COLORS.items()):
            bar_rows = [row for row in int4_rows if (row["model"], row["method"]) == (model, method)]
            if not bar_rows:
                continue  # an empty bar would still be in the legend
            positions = [groups.index(row["group"]) + 0.27 * (i - 1) for row in bar_rows]
            ax.bar(positions, [row["kl"] for row in bar_rows], 0.25, color=color, label=method)
        ax.set_yscale("log")
        ax.set_xticks(range(len(groups)), [f"groups of {group}" for group in groups])
    shared_legend(fig, axes)
    yield PlottedFigure("quality", fig, int4_rows)
