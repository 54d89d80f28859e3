"""Triton kernels compiled for a GPU that need not be there, as far as PTX, which is what the emulator runs.

`ptxas`, which makes machine code of PTX, does not run: that is a fifth of the time. Triton keeps what it compiled in
its own cache on disk, under a key of its sources, its version and all options. The key of a kernel without machine code
is another one, so that nobody else is given it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from ..compiler.cross_compile import CrossCompileDriver
from ..compiler.gpus import TARGETS

PTX_ONLY = "PTX for bench.emulator"  # begins the key of what is compiled here
EMULATED_TARGETS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")  # later ones have tensor cores of other kinds
MAX_THREADS = 1024  # in a block, of every NVIDIA GPU (CUDA C++ programming guide)


class EmulatorDriver(CrossCompileDriver):
    """The driver of a GPU whose memory is the CPU's."""

    def get_current_device(self) -> int:
        """A device that is no other driver's: Triton caches kernels in memory by device."""
        return super().get_current_device() - len(TARGETS)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, *_: Any) -> Any:
        """Triton asks for it where it would load a kernel, to launch it or to say how many registers it has."""
        raise NotImplementedError(
            "an emulated kernel has no machine code, so its registers are not known; see bench.inspect"
        )


@contextmanager
def compiling_to_ptx(target: str) -> Iterator[Callable[..., Any]]:
    """Inside, Triton compiles for the target, as far as PTX with its line numbers. Errors: ValueError.

    Yields a function that compiles a kernel for the arguments of a launch. The key of the result holds the kernel's
    file, as PTX names it: a copy of the file shall not be given the PTX of the first. The key stands where Triton has
    options of `ptxas`, which all of its versions take as a part of their keys.
    """
    if target not in EMULATED_TARGETS:
        raise ValueError(f"{target!r} is no target of the emulator; there are: {', '.join(EMULATED_TARGETS)}")
    runtime: Any = knobs.runtime
    others_hook = runtime.add_stages_inspection_hook
    run: Any = JITFunction.run

    def compile_kernel(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        key = f"{PTX_ONLY}, of {kernel.fn.__code__.co_filename}"
        return run(kernel, *args, grid=None, warmup=True, **kwargs | {"ptx_options": key})

    def stop_at_ptx(*args: Any) -> Any:
        """Triton asks with (backend, stages, …) to change the stages, some versions also without for parts of keys."""
        answer = others_hook(*args) if others_hook else ("", "")
        if args:
            args[1]["cubin"] = lambda ptx, metadata: b""
        return answer

    try:
        previous = driver.active
    except RuntimeError:  # there is no GPU
        previous: Any = None
    with runtime.scope(), knobs.compilation.scope():
        runtime.add_stages_inspection_hook = stop_at_ptx
        knobs.compilation.store_binary_only = False
        knobs.compilation.disable_line_info = False
        driver.set_active(EmulatorDriver(target))
        try:
            yield compile_kernel
        finally:
            driver.set_active(previous)


def check_resources(compiled: Any, target: str) -> None:
    """OutOfResources, as at a launch on the GPU, if a block has more shared memory or threads than one may have.
    NotImplementedError for clusters of blocks, and for launches that need all blocks at once.
    """
    metadata, limit = compiled.metadata, TARGETS[target].max_shared_per_block
    if metadata.shared > limit:
        raise OutOfResources(metadata.shared, limit, "shared memory")
    if 32 * metadata.num_warps > MAX_THREADS:
        raise OutOfResources(32 * metadata.num_warps, MAX_THREADS, "threads")
    if metadata.num_ctas > 1:
        raise NotImplementedError(
            f"{metadata.name}: clusters of blocks (num_ctas={metadata.num_ctas}) are not emulated"
        )
    if metadata.launch_cooperative_grid:
        raise NotImplementedError(f"{metadata.name}: cooperative launches are not emulated")
