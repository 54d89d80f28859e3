"""The command line: every command of `commands/`."""

import argparse
import pkgutil
import sys
from importlib import import_module

from . import commands
from .console import exit_code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="vila-triton", description="Ask a VILA about pictures.")
    into = top.add_subparsers(dest="command", required=True)
    for module in pkgutil.iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{module.name}").configure(into)
    return top


def run() -> int | None:
    args = parser().parse_args()
    return args.run(args)


def main() -> int:
    return exit_code("vila-triton", run)


if __name__ == "__main__":
    sys.exit(main())
