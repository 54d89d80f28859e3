"""Tools for who writes kernels. Ctrl-C while one of them is still importing, before its `main`, is one line as well."""

import sys
from types import TracebackType

_show = sys.excepthook


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        _show(kind, error, trace)


sys.excepthook = _interrupted
