"""A stand-in for a CUDA GPU, so that the code that only a GPU runs can run, and be tested, without one.

    python -m bench.standin bench.ops int4_matmul --default --case toy     any module of Python, on the stand-in
    python -m bench.standin --counts FILE pytest -m gpu                   and what it launched, waited for, compiled
    python -m bench.standin --emulate sm_90 pytest -m gpu                 with compiled kernels

Tensors say cuda:0 and keep their numbers in the memory of the CPU, and `torch.cuda` answers as an H100 would. What CUDA
refuses is refused with its own kind of error: operands of two devices, a generator of another device, what waits for
the device while a graph is captured, a launch over more blocks than a grid has, a launch on a device that is not the
current one, CPU memory in a kernel, more memory than there is. What makes the host wait for the device is counted by
the line that does it, and so is every kernel a GPU would have had to compile.

Triton's kernels run in its interpreter, in which there is no bfloat16, or with --emulate as they are compiled for a
GPU: choices, dtypes, assembly and layouts are then those of a GPU, each launch is checked (`bench.emulator`), and
`torch.cuda` answers as a GPU of that architecture.

Other numbers are those of the CPU, but for division by a number, which CUDA does as a product with its rounded
reciprocal. Times mean nothing.

    gpus.py      the GPUs that it can stand in for
    device.py    the tensor, and what its operators refuse
    cuda.py      torch.cuda: properties, memory, events, streams, graphs, generators
    division.py  division by a number
    transfers.py pinned memory, and copies that the host does not wait for
    launches.py  Triton launches
    counts.py    what is counted
"""

import os
import sys

TARGETS = ("sm_80", "sm_89", "sm_90")  # that kernels can be emulated for
DEFAULT_TARGET = "sm_90"
emulated: str | None = None  # the target whose kernels are emulated in this process


def activate(emulate: str | None = None) -> None:
    """Puts the stand-in in place, for the rest of the process: before anything imports triton.

    emulate: the target whose compiled kernels run; None lets them be interpreted.
    Errors: ValueError for a target that it cannot stand in for.
    """
    global emulated
    if emulate is not None and emulate not in TARGETS:
        raise ValueError(f"no GPU {emulate!r} can be emulated, only {', '.join(TARGETS)}")
    os.environ["TRITON_INTERPRET"] = "0" if emulate else "1"
    from . import cuda, launches

    cuda.become(emulate or DEFAULT_TARGET)
    if emulate:
        emulated = emulate
        launches.emulate(emulate)
    else:
        launches.interpret(DEFAULT_TARGET)


def is_active() -> bool:
    """Returns whether this process runs on the stand-in."""
    return "bench.standin.cuda" in sys.modules


def command_prefix() -> list[str]:
    """Returns the beginning of a command that runs a module: on the same stand-in if this process runs on one."""
    options = [f"--emulate={emulated}"] if emulated else []
    return [sys.executable, "-m", *(["bench.standin", *options] if is_active() else [])]
