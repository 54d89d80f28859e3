"""Three fixes of Triton's interpreter, which importing this module applies, and which implementations it runs.

While it runs a kernel, the interpreter replaces the functions of `triton.language` for the whole process and keeps the
position in the grid in one global object. A lock therefore lets one kernel run at a time.

It also replaces those functions at every call of a device function, and builds a table of dtypes at every operation,
which together take half of its time. Once a launch, and once, is enough.

In a loop `for start in range(0, E, BLOCK)` Python asks for E as an index. The interpreter holds E in an array of one
element, and Triton 3.6 returns int(array), which numpy 2.4 and later refuse for arrays with dimensions; Triton 3.7
squeezes the array first. No bound in pyproject.toml can exclude one numpy for one Triton, so the method is replaced.
"""

import sys
import threading
from functools import cache, wraps
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface

from .op import Impl


def uses_triton_kernels(impl: Impl) -> bool:
    """True if the file of the implementation defines or imports a Triton kernel."""
    return any(isinstance(value, KernelInterface) for value in vars(sys.modules[impl.fn.__module__]).values())


def patch_scalar_index() -> None:
    """Let interpreted scalars be indices under every numpy."""
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


def patch_language_once() -> None:
    """Replace the functions of a language module once a launch, and not again in each device function."""
    original_call, original_patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced: set[str] = set()  # the modules whose functions this launch has replaced

    @cache
    def language_modules(fn: Any) -> set[str]:
        return {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}

    @wraps(original_call)
    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        original_call(self, *args, **kwargs)

    def patch(fn: Any) -> Any:
        modules = language_modules(fn)
        if modules and modules <= replaced:
            return interpreter._LangPatchScope()
        replaced.update(modules)
        return original_patch(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch, patch


def remember_dtypes() -> None:
    """Look numpy's dtype of a Triton dtype up once."""
    original_lookup = cache(interpreter._get_np_dtype)

    def lookup(dtype: Any) -> Any:
        return original_lookup(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)

    interpreter._get_np_dtype = lookup


remember_dtypes()
patch_language_once()
serialize_kernels()  # outermost, as `replaced` is of one launch at a time
if triton.__version__.startswith("3.6."):
    patch_scalar_index()
