"""Times and configs as tables print them."""

from collections.abc import Mapping
from typing import Any

BLOCKS = "MNK"


def unit(seconds: float) -> str:
    """A time in the unit that suits it."""
    scale, name = next((s, n) for s, n in ((1, "s "), (1e-3, "ms"), (0, "us")) if seconds >= s)
    return f"{seconds / (scale or 1e-6):8.2f} {name}"


def brief(config: Mapping[str, Any]) -> str:
    """64x32x64 w4 s2: the blocks, always M, N and K in that order, the warps, the stages, then what else there is."""
    rest = dict(config)
    names = sorted((key for key in rest if key.startswith("BLOCK")), key=lambda key: (BLOCKS.find(key[-1]), key))
    blocks = "x".join(str(rest.pop(key)) for key in names)
    marks = [f"{mark}{rest.pop(key)}" for key, mark in (("num_warps", "w"), ("num_stages", "s")) if key in rest]
    return " ".join([blocks, *marks, *(f"{key}={value}" for key, value in rest.items())])
