"""What int4 costs, by method and group: divergence from the model as it was."""

from collections.abc import Iterator, Mapping, Sequence

from bench.plots.style import COLOURS, GREY, legend, panels

from .figure import Picture, Row

METHODS = {"rtn": GREY, "upstream": COLOURS[1], "ours": COLOURS[0]}


def quality(rows: Mapping[str, Sequence[Row]]) -> Iterator[Picture]:
    """A panel a model: KL a token on a log scale, a bar for each method at each group size."""
    shown = [row for row in rows["quality"] if row["group"]]
    models = list(dict.fromkeys(row["model"] for row in shown))
    fig, axes = panels("KL(float32 ‖ int4) a token, in nats", models, width=4)
    for ax, model in zip(axes, models):
        groups = sorted({row["group"] for row in shown if row["model"] == model})
        for i, (method, colour) in enumerate(METHODS.items()):
            found = [row for row in shown if (row["model"], row["method"]) == (model, method)]
            if not found:
                continue  # an empty bar would still be in the legend
            places = [groups.index(row["group"]) + 0.27 * (i - 1) for row in found]
            ax.bar(places, [row["kl"] for row in found], 0.25, color=colour, label=method)
        ax.set_yscale("log")
        ax.set_xticks(range(len(groups)), [f"groups of {group}" for group in groups])
    legend(fig, axes)
    yield Picture("quality", fig, shown)
