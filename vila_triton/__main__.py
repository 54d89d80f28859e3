"""The command line `vila-triton`: every command of `commands/`."""

import argparse
import pkgutil
import sys
from importlib import import_module

from . import commands
from .console import exit_code

EPILOG = """`vila-triton COMMAND --help` lists the options of a command. `python -m bench` lists the commands that check
and measure kernels and models; `python -m vila_triton.tiny.evaluate` grades the bundled model."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its description lists the commands by the question that they answer."""
    top = argparse.ArgumentParser(
        prog="vila-triton",
        usage="vila-triton COMMAND ...",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = top.add_subparsers(dest="command", required=True, prog="vila-triton", help=argparse.SUPPRESS)
    lines = {question: f"\n{question}" for question in commands.QUESTIONS}
    for info in pkgutil.iter_modules(commands.__path__):
        if not info.name.startswith("_"):
            module = import_module(f"{commands.__name__}.{info.name}")
            module.configure(subparsers)
            lines[module.QUESTION] += "".join(f"\n  {name:10}{text}" for name, text in module.SUMMARIES.items())
    top.description = "\n".join(["VILA, a vision-language model, on Triton kernels.", *lines.values()])
    return top


def run() -> int | None:
    """Parse the command line, run its command, and return the exit code (None for 0)."""
    args = build_parser().parse_args()
    return args.run(args)


def main() -> int:
    return exit_code("vila-triton", run)


if __name__ == "__main__":
    sys.exit(main())
