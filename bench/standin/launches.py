"""Triton launches on the stand-in: checked as CUDA checks them, counted, then interpreted, or compiled and emulated."""

import atexit
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..compiler.cross_compile import CrossCompileDriver
from .counts import count_launch
from .device import CudaTensor, captures, current_device, host_view
from .transfers import queued

# Blocks along x, y and z: CUDA C++ programming guide, technical specifications per compute capability.
LIMITS = (2**31 - 1, 65535, 65535)
compiled_twins: dict[Any, JITFunction] = {}  # the function that a GPU would compile, by the one that is interpreted
for_the_process = ExitStack()  # holds what is never ended


def intercept(cls: Any, run: Callable[..., Any]) -> None:
    """Lets launches of a class of kernels call `run`, on CPU tensors over the same memory, after the checks of CUDA.

    Errors of a launch: ValueError for a tensor of the CPU or of a device that is not the current one, RuntimeError for
    more blocks than a grid may have.
    """

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor):
                raise ValueError(f"{self.__name__}: Pointer argument cannot be accessed from Triton (cpu tensor?)")
            if isinstance(x, CudaTensor) and x.index != current_device[0]:
                raise ValueError(
                    f"{self.__name__}: a tensor is on {x.device}, but the current device is cuda:{current_device[0]}"
                )
        args, kwargs = tree_map(lambda x: host_view(x) if isinstance(x, CudaTensor) else x, (args, kwargs))
        blocks = grid({**dict(zip(self.arg_names, args)), **kwargs}) if callable(grid) else grid
        blocks: Any = (blocks,) if isinstance(blocks, int) else tuple(blocks)  # pyright: ignore
        if len(blocks) > 3 or any(n > limit for n, limit in zip(blocks, LIMITS)):
            raise RuntimeError(
                f"{self.__name__}: Triton Error [CUDA]: invalid argument: a grid of {blocks}, at most {LIMITS}"
            )
        count_launch(self.__name__, specialization_key(self, args, kwargs))
        queued[0] += 1
        if warmup or not all(blocks):
            return

        def call() -> None:
            run(self, *args, grid=blocks, warmup=False, **kwargs)

        if captures:
            captures[0].calls.append((call, []))
        else:
            call()

    cls.run = launch


def specialization_key(function: Any, args: Any, kwargs: Any) -> str:
    """Returns the key of Triton's cache, which tells one compiled kernel of the function from another."""
    if not isinstance(function, JITFunction):
        function = compiled_twin(function)
    active: Any = driver.active
    binder = function.device_caches[active.get_current_device()][-1]
    _, key, options = binder(*args, **{**kwargs, "debug": False})
    return f"{key}{sorted(options.items())}"


def compiled_twin(function: Any) -> JITFunction:
    """Returns the function that a GPU would compile in place of an interpreted one."""
    if function not in compiled_twins:
        options_kept = ("do_not_specialize", "do_not_specialize_on_alignment")
        compiled_twins[function] = JITFunction(
            function.fn, **{k: v for k, v in function.kwargs.items() if k in options_kept}
        )
    return compiled_twins[function]


def interpret(target: str) -> None:
    """Lets Triton's interpreter run all kernels, for the rest of the process. Kernels to compile are counted as the
    target would need them.
    """
    driver.set_active(CrossCompileDriver(target))
    intercept(interpreter.InterpretedFunction, interpreter.InterpretedFunction.run)


def emulate(target: str) -> None:
    """Lets all kernels be compiled for the target and emulated, for the rest of the process. A launch that does what no
    kernel may do raises `KernelFault`.
    """
    from ..emulator import emulating

    driver.set_active(CrossCompileDriver(target))  # else Triton looks for a GPU's, now that torch sees one
    atexit.register(for_the_process.close)
    report = for_the_process.enter_context(emulating(target, counters=False))
    run_emulated = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C._DisableTorchDispatch():  # what the emulator computes with torch is no work of the device
            run_emulated(self, *args, **kwargs)
        report.launches.clear()  # there may be thousands

    intercept(JITFunction, run)
