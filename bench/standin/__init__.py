"""A stand-in for a CUDA GPU, so that the code that only a GPU runs can run, and be tested, without one.

    python -m bench.standin bench.ops int4_matmul --default --case toy     any module of Python, on the stand-in
    python -m bench.standin --counts FILE pytest -m gpu                   and what it launched, waited for, compiled

Tensors say cuda:0 and keep their numbers in the memory of the CPU, `torch.cuda` answers as an H100 would, and Triton's
kernels run in its interpreter. What CUDA refuses is refused with its own kind of error: operands of two devices, a
generator of another device, what waits for the device while a graph is captured, a launch over more blocks than a grid
has, a launch on a device that is not the current one, CPU memory in a kernel, more memory than there is. What makes the
host wait for the device is counted by the line that does it, and so is every kernel a GPU would have had to compile.

Numbers are those of the CPU, but for division by a number, which CUDA does as a product with its rounded reciprocal.
Times mean nothing. bfloat16 kernels are not run: Triton's interpreter would compute them wrongly.

    device.py    the tensor, and what its operators refuse
    cuda.py      torch.cuda: properties, memory, events, streams, graphs, generators
    launches.py  Triton launches
    counts.py    what is counted
"""

import sys


def is_active() -> bool:
    """Returns whether this process runs on the stand-in."""
    return "bench.standin.cuda" in sys.modules


def command_prefix() -> list[str]:
    """Returns the beginning of a command that runs a module: on the stand-in if this process runs on it."""
    return [sys.executable, "-m", *(["bench.standin"] if is_active() else [])]
