"""The package `vila_triton.kernels`: the files of kernels/, which is beside this package or, in a wheel, inside it.

kernels/ has no `__init__.py`, since a top-level package of that name would shadow Hugging Face's `kernels`.
"""

from .paths import data_dir
from .registry import interpreter  # noqa: F401 (its fixes apply before any kernel runs)

__path__ = [str(data_dir("kernels"))]
