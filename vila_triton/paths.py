"""Folders that come with the package: configs/, kernels/ and the bundled checkpoint."""

from pathlib import Path

_package_dir = Path(__file__).resolve().parent

BUNDLED_CHECKPOINT = _package_dir / "tiny" / "checkpoint"


def data_dir(name: str) -> Path:
    """A folder that lies inside the package in a wheel, and beside it in a checkout."""
    return next(d for d in (_package_dir / name, _package_dir.parent / name) if d.is_dir())


def config_dir() -> Path:
    """Return the folder configs/."""
    return data_dir("configs")
