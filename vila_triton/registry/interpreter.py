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


def uses_triton_kernels(impl: Impl) -> bool:
    """Whether the file of the implementation defines or imports a Triton kernel."""
    return any(isinstance(value, KernelInterface) for value in vars(sys.modules[impl.fn.__module__]).values())


def patch_scalar_index() -> None:
    """Make interpreted scalars good as indices under every numpy."""
    original_patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def serialize_kernels() -> None:
    """Make threads wait for each other's interpreted kernels."""
    original_call, lock = interpreter.GridExecutor.__call__, threading.Lock()

    @wraps(original_call)
    def locked(self: Any, *args: Any, **kwargs: Any) -> None:
        with lock:
            original_call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = locked


serialize_kernels()
if triton.__version__.startswith("3.6."):
    patch_scalar_index()
