"""Folders that come with the package: configurations and the bundled checkpoint."""

from pathlib import Path

_here = Path(__file__).resolve().parent

BUNDLED_CHECKPOINT = _here / "tiny" / "checkpoint"


def config_dir() -> Path:
    """The configs/ folder: inside the package in a wheel, beside it in a checkout."""
    return next(d for d in (_here / "configs", _here.parent / "configs") if d.is_dir())
