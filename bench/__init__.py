"""Commands that check, time, tune and inspect kernels and models; `python -m bench` lists them.

    correctness/  error budgets, guarded memory, the gate before a time, reports of a failure
    compiler/     cross-compiling kernels and reading what the compiler made of them
    emulator/     compiled kernels run on the CPU: faults, and counters of what they do
    measure/      timing, rows of results, cases, models and steps to time
    peers/        other libraries' kernels as implementations of our ops
    plots/        figures from rows
    serving/      load on a server, and the servers to compare
    tuner/        the search for configs
    standin/      a stand-in for a CUDA GPU

Importing the package makes Ctrl-C one line of output, even while a command is still importing, and a package that is
missing, too, with exit code 2.
"""

import os
import sys
from types import TracebackType

EXTRA = ("hypothesis", "matplotlib", "pytest")  # what only bench needs
_default_excepthook = sys.excepthook


def _excepthook(error_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(error_type, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and error.name in EXTRA:
        print(f"bench needs {error.name}: pip install 'vila-triton[bench]'", file=sys.stderr, flush=True)
        os._exit(2)  # what is raised in this hook is ignored, and 1 means that something is wrong with a kernel
    else:
        _default_excepthook(error_type, error, trace)


sys.excepthook = _excepthook
