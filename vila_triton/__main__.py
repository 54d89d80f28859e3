"""The command line: every command of `commands/`."""

import argparse
import pkgutil
import sys
from importlib import import_module

from . import commands


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="vila-triton", description="Ask a VILA about pictures.")
    into = top.add_subparsers(dest="command", required=True)
    for module in pkgutil.iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{module.name}").configure(into)
    return top


def main() -> int:
    args = parser().parse_args()
    try:
        return args.run(args) or 0
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        print(f"vila-triton: {error.args[0] if error.args else error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
