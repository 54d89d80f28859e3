"""Runs a module of Python on a stand-in for a CUDA GPU: `python -m bench.standin MODULE ARGUMENTS`"""

import argparse
import atexit
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def is_runnable(module: str) -> bool:
    """Returns whether `python -m MODULE` would find something to run. The packages it lies in are imported."""
    if not module or module.startswith("."):
        return False
    try:
        spec = find_spec(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # what a package of the name needs
        return False
    return spec is not None and (spec.submodule_search_locations is None or is_runnable(f"{module}.__main__"))


def main() -> None:
    import bench.standin as package

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.standin", description=package.__doc__, formatter_class=formatter)
    parser.add_argument("--counts", type=Path, metavar="FILE", help="write what was counted to this file, as JSON")
    parser.add_argument(
        "--emulate", choices=package.TARGETS, metavar="TARGET", help="run kernels as they are compiled for this GPU"
    )
    parser.add_argument("module", help="as after `python -m`")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.counts and not args.counts.resolve().parent.is_dir():
        parser.error(f"--counts: there is no folder {args.counts.resolve().parent}")
    package.activate(args.emulate)
    from .counts import counters

    if not is_runnable(args.module):
        parser.error(f"there is no module {args.module} that can be run")
    if args.counts:
        atexit.register(counters[0].write, args.counts.resolve())
    sys.argv = [args.module, *args.arguments]
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
