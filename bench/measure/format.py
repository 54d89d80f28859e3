"""Times and configs as tables print them."""

from collections.abc import Mapping
from typing import Any

BLOCK_ORDER = "MNK"


def format_seconds(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    scale, name = next((s, n) for s, n in ((1, "s "), (1e-3, "ms"), (0, "us")) if seconds >= s)
    return f"{seconds / (scale or 1e-6):8.2f} {name}"


def format_config(config: Mapping[str, Any]) -> str:
    """Returns a config in short: 64x32x64 w4 s2 for the blocks in the order M, N, K, the warps and the stages; then the
    rest.
    """
    remaining = dict(config)
    names = sorted(
        (key for key in remaining if key.startswith("BLOCK")), key=lambda key: (BLOCK_ORDER.find(key[-1]), key)
    )
    blocks = "x".join(str(remaining.pop(key)) for key in names)
    marks = [
        f"{mark}{remaining.pop(key)}" for key, mark in (("num_warps", "w"), ("num_stages", "s")) if key in remaining
    ]
    return " ".join([blocks, *marks, *(f"{key}={value}" for key, value in remaining.items())])
