"""Checks everything that runs by default against float64: `python -m bench.correctness`, see `default_kernels`."""

import sys

from .default_kernels import main

if __name__ == "__main__":
    sys.exit(main())
