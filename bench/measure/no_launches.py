"""Launches of Triton kernels that are compiled for a GPU which need not be there, and end at its driver's call.

All of Python's part of a launch runs: launchers, Triton's binder and its launcher. What the driver would be given is
handed to a function instead, so results are what memory holds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.driver import driver

from ..compiler.cross_compile import CrossCompileDriver
from ..compiler.gpus import TARGETS


@dataclass(frozen=True)
class DriverLaunch:
    """A launch as the driver is given it: a compiled kernel, its grid, and its arguments with constants."""

    kernel: str
    compiled: Any  # Triton's, with `.asm` and `.metadata`
    grid: tuple[int, int, int]
    args: tuple[Any, ...]

    @property
    def cubin(self) -> bytes:
        """The machine code."""
        return self.compiled.asm["cubin"]


class NoLaunchDriver(CrossCompileDriver):
    """The driver of a GPU whose launches are handed to a function. Its tensors lie on the CPU, or on no device."""

    def __init__(self, target: str, launch: Callable[[DriverLaunch], None]):
        super().__init__(target)
        self.launch = launch

    def get_current_device(self) -> int:
        """A device that is no other driver's: Triton caches kernels in memory by device."""
        return super().get_current_device() - 2 * len(TARGETS)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def utils(self) -> "NoLaunchDriver":
        """Triton loads kernels by what lies here, and asks for limits of the device."""
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": TARGETS[self.target].max_shared_per_block}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads): handles of nothing."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> "NoLauncher":
        return NoLauncher(source, metadata)


class NoLauncher(CudaLauncher):
    """Triton's launcher for NVIDIA, whose last call, which is into C, is replaced."""

    def __init__(self, source: Any, metadata: Any):
        self.arg_annotations = self.kernel_signature = None  # of use to the call into C alone
        self.num_ctas = metadata.num_ctas
        for name in ("global_scratch", "profile_scratch"):
            for part in ("size", "align"):
                setattr(self, f"{name}_{part}", getattr(metadata, f"{name}_{part}"))
        self.launch_cooperative_grid, self.launch_pdl = metadata.launch_cooperative_grid, metadata.launch_pdl
        active: Any = driver.active
        kernels = source.fn.device_caches[active.get_current_device()][0].values()
        self.name = source.fn.__name__
        self.compiled = next(kernel for kernel in kernels if kernel.metadata is metadata)

    def launch(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        """Hand the launch over; the arguments of the kernel are the last of `rest`."""
        active: Any = driver.active
        active.launch(DriverLaunch(self.name, self.compiled, (x, y, z), rest[-1]))


@contextmanager
def without_launching(target: str, launch: Callable[[DriverLaunch], None] = lambda _: None) -> Iterator[None]:
    """Inside, launches of Triton kernels are compiled for the target, and handed to `launch` in place of its driver."""
    try:
        previous = driver.active
    except RuntimeError:  # there is no GPU
        previous: Any = None
    driver.set_active(NoLaunchDriver(target, launch))
    try:
        yield
    finally:
        driver.set_active(previous)
