"""The command line: every command of `commands/`."""

import argparse
import pkgutil
import sys
from importlib import import_module

from . import commands
from .console import exit_code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vila-triton", description="Ask a VILA about pictures.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for module in pkgutil.iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{module.name}").configure(subparsers)
    return parser


def run_command() -> int | None:
    args = build_parser().parse_args()
    return args.run(args)


def main() -> int:
    return exit_code("vila-triton", run_command)


if __name__ == "__main__":
    sys.exit(main())
