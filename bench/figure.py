"""How every picture looks: axes with units, and under them what was measured where, when and from which commit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which those who see fewer colours can tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "grid.alpha": 0.3,
        "savefig.dpi": 144,
        "svg.hashsalt": "vila-triton",  # the same picture from the same rows, byte for byte
    }
)


def figure(title: str, width: float = 8, height: float = 4.8) -> tuple[Figure, Axes]:
    """An empty picture with one pair of axes."""
    fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.set_title(title, loc="left", fontweight="bold")
    return fig, ax


def save(fig: Figure, file: Path, stamp: Mapping[str, Any]) -> list[Path]:
    """Write FILE.png and FILE.svg, with the stamp of the rows they show; returns both paths."""
    words = (str(stamp.get(key, "")) for key in ("device", "date", "commit"))
    versions = " ".join(f"{key} {stamp[key]}" for key in ("torch", "triton") if key in stamp)
    fig.supxlabel(
        " | ".join(word for word in (*words, versions) if word), fontsize=7, color="#666666", x=0.01, ha="left"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    paths = [file.with_suffix(ending) for ending in (".png", ".svg")]
    for path in paths:
        fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)
    return paths
