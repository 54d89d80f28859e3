"""Checks of compiled code without a GPU: inside `compiled_for`, kernels run as compiled for a target, in the emulator.

`repeat_compiled` is for commands whose own process interprets kernels, which is settled when a kernel is imported.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vila_triton.registry import Impl

from ..emulator import KernelFault, Report, emulating
from ..measure import rows
from .error_budget import DEVICE, INTERPRETED
from .failure_report import format_settings
from .guarded_memory import MismatchError

RUNS_COMPILED = DEVICE == "cpu" and not INTERPRETED  # this process can


@contextmanager
def compiled_for(target: str | None, impl: Impl, config: Mapping[str, Any]) -> Iterator[Report | None]:
    """Inside, kernels of the CPU's tensors are compiled for the target and emulated; None: they run as always.

    Errors: MismatchError for what a kernel did and none may do, which names the call, the target and the source line.
    """
    if target is None:
        yield None
        return
    try:
        with emulating(target) as report:
            yield report
    except KernelFault as fault:
        first, call = fault.faults[0], f"{impl.op} {impl.name} {format_settings(config)} for {target}"
        raise MismatchError(fault.kind, f"{call}, {first.source}: {first.message}\n{fault}") from fault


def repeat_compiled(module: str, words: Sequence[str], target: str) -> int:
    """Run the command of a module again, with --compiled, in a process that neither interprets kernels nor sees a GPU.

    Returns its exit code.
    """
    paths = [*([str(rows.ROOT)] if rows.IN_CHECKOUT else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-m", module, *words, "--compiled", target], env=env).returncode
