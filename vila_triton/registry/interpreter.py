"""Triton's interpreter in many threads, and that of Triton 3.6 under numpy 2.4 and later.

While a kernel runs interpreted, the functions of `triton.language` are others, for the whole process, and the place in
the grid stands in one object. So one runs at a time.

A loop `for start in range(0, E, BLOCK)` asks for E as an index, which the interpreter holds as an array of one element.
Triton 3.6 gives int(array), which numpy takes only of arrays without dimensions since 2.4; Triton 3.7 squeezes it
first. No bound in pyproject.toml can say "this numpy with that Triton", so the one method is put right here; and what
is interpreted at all: the implementations that hold Triton kernels.
"""

import sys
import threading
from functools import wraps
from typing import Any

import triton
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface

from .op import Impl


def holds_kernels(impl: Impl) -> bool:
    """Whether the file of the implementation defines or imports a Triton kernel."""
    return any(isinstance(value, KernelInterface) for value in vars(sys.modules[impl.fn.__module__]).values())


def take_scalars_as_indices() -> None:
    """Make interpreted scalars good as indices under every numpy."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def one_at_a_time() -> None:
    """Make threads wait for each other's interpreted kernels."""
    run, lock = interpreter.GridExecutor.__call__, threading.Lock()

    @wraps(run)
    def locked(self: Any, *args: Any, **kwargs: Any) -> None:
        with lock:
            run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = locked


one_at_a_time()
if triton.__version__.startswith("3.6."):
    take_scalars_as_indices()
