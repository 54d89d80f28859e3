"""The door to kernels/: a top-level package of that name would shadow Hugging Face's `kernels`, so it is not one."""

from pathlib import Path

from .registry import interpreter  # noqa: F401 (what it mends is mended before any kernel runs)

_package_dir = Path(__file__).resolve().parent
__path__ = [str(next(d for d in (_package_dir / "kernels", _package_dir.parent / "kernels") if d.is_dir()))]
