"""Tools for who writes kernels. Ctrl-C while one of them is still importing, before its `main`, is one line as well."""

import sys
from types import TracebackType

_default_excepthook = sys.excepthook


def _excepthook(error_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(error_type, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        _default_excepthook(error_type, error, trace)


sys.excepthook = _excepthook
