"""Parts of all commands of bench: the way they end, as `vila_triton.console` has it for the commands of vila-triton;
and --kernels, which makes files of one's own known.
"""

import argparse
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from vila_triton.arguments import KERNELS_HELP
from vila_triton.console import exit_code
from vila_triton.registry import discover

from .measure import rows

P = ParamSpec("P")
WRONG_COMMAND = 2  # since 1 is the answer that something is wrong


class DiscoverAction(argparse.Action):
    """Imports the kernels of a path as it is read, so that whatever a command looks for afterwards is there."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        discover(values)


def kernels_option() -> argparse.ArgumentParser:
    """Returns a parent parser with --kernels; every command that runs ops has it. Processes that a command starts get
    the paths from `vila_triton.registry.sources.kernel_paths`.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--kernels", action=DiscoverAction, default=argparse.SUPPRESS, metavar="PATH", help=KERNELS_HELP
    )
    return parser


def tool(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorates the `main` of a command; the result is called in `sys.exit(main())`.

    An error is one line and the exit code 2. Ctrl-C is one line, which names the files of rows that were written, and
    the exit code 130.
    """
    name = main.__globals__["__spec__"].name.removesuffix(".__main__")  # `__module__` is "__main__" in what is run

    @wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        def call_main() -> int | None:
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt as error:
                if error.args or not rows.WRITTEN_FILES:
                    raise
                kept = ", ".join(map(str, rows.WRITTEN_FILES))
                raise KeyboardInterrupt(f"interrupted; what was known by then is in {kept}") from None

        return exit_code(name, call_main, WRONG_COMMAND)

    return wrapper
