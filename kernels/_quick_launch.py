"""Launches that take a shorter way than Triton's own to what was compiled.

For each launch Triton asks of every argument what it specializes a kernel by, writes the answers out as one text, looks
the compiled kernel up by it, and calls its hooks. Here one tuple is the key: tensors by dtype and by whether their
address is a multiple of 16, everything else by its value, which says more than Triton asks for. What is new goes
Triton's way, and so do launches that someone watches or replaces: interpreted, emulated, compiled only, or profiled.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

MOST_LAUNCHES = 4096  # that a kernel remembers
_TENSORS = (Tensor, torch.nn.Parameter)


def specialization(x: Any) -> Any:
    """The part of an argument that a compiled kernel may depend on. Errors: TypeError for what is not hashable."""
    kind = type(x)
    if kind is int:
        return x
    if kind in _TENSORS:
        return x.dtype, x.data_ptr() % 16 == 0
    if kind is tuple:
        return tuple(map(specialization, x))
    return kind, x  # True, 1 and 1.0 are equal


def is_watched(hook: Any) -> bool:
    """Return True if a hook of Triton's launches does something."""
    return hook is not None and bool(getattr(hook, "calls", True))


class QuickKernel(JITFunction):
    """A kernel that remembers what it launched. Reading the environment, Triton's knobs included, is left to the first
    launch of a specialization; so is the check that global values which the kernel uses are what they were.
    """

    def __init__(self, kernel: Any):
        options = ("version", "do_not_specialize", "do_not_specialize_on_alignment", "debug", "noinline")
        super().__init__(kernel.fn, **{name: getattr(kernel, name) for name in options})
        self.launched: dict[Any, tuple[Any, tuple[Any, ...]]] = {}  # compiled, and last arguments

    def __getitem__(self, grid: Any) -> Any:
        return partial(self.launch, grid)

    def launch(self, grid: Any, *args: Any, **kwargs: Any) -> Any:
        """Launch over a grid, as `kernel[grid](...)` does -> the compiled kernel."""
        runtime, active = knobs.runtime, driver.active
        if (
            JITFunction.run.__module__ != JITFunction.__module__  # replaced
            or callable(grid)
            or self.pre_run_hooks
            or is_watched(runtime.launch_enter_hook)
            or is_watched(runtime.launch_exit_hook)
        ):
            return self.run(*args, grid=grid, warmup=False, **kwargs)
        device = active.get_current_device()
        key = device, runtime.add_stages_inspection_hook, *map(specialization, args), *kwargs.items()
        found = self.launched.get(key)
        if found is None:
            compiled = self.run(*args, grid=grid, warmup=False, **kwargs)
            if not any(isinstance(x, Tensor) for x in kwargs.values()):
                defaults = {p.name: p.default for p in self.params}
                rest = tuple(kwargs.get(name, defaults[name]) for name in self.arg_names[len(args) :])
                if len(self.launched) >= MOST_LAUNCHES:
                    self.launched.clear()
                self.launched[key] = compiled, rest
            return compiled
        compiled, rest = found
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *rest)
        return compiled


def quick_launch(kernel: Any) -> Any:
    """Let `kernel[grid](...)` of a `triton.jit` function take the shorter way, if it is compiled at all."""
    return QuickKernel(kernel) if type(kernel) is JITFunction else kernel
