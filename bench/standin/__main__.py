"""`python -m bench.standin MODULE ARGUMENTS`: see the package."""

import argparse
import atexit
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    import bench.standin as package

    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, metavar="FILE", help="write what was counted to this file, as JSON")
    parser.add_argument("module", help="as after `python -m`")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel
    from . import cuda, launches  # noqa: F401  (puts the stand-in in place)
    from .counts import counters

    if options.counts:
        atexit.register(counters[0].write, options.counts.resolve())
    sys.argv = [options.module, *options.arguments]
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
