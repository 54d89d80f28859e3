"""Fixes of Triton's interpreter, which importing this module applies, and which implementations it runs.

While it runs a kernel, the interpreter replaces the functions of `triton.language` for the whole process and keeps the
position in the grid in one global object. A lock therefore lets one kernel run at a time.

Two thirds of its time go into work that is done once too often: it replaces those functions at every call of a device
function, builds a table of dtypes at every operation, and a shape for every value and again for its type; and it looks
for overflows of 32-bit integers at every sum and product, but says nothing of what it finds unless it debugs.

In a loop `for start in range(0, E, BLOCK)` Python asks for E as an index. The interpreter holds E in an array of one
element, and Triton 3.6 returns int(array), which numpy 2.4 and later refuse for arrays with dimensions; Triton 3.7
squeezes the array first. No bound in pyproject.toml can exclude one numpy for one Triton, so the method is replaced.
"""

import sys
import threading
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import triton
import triton.language as tl
from triton import knobs
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


def remember_shapes() -> None:
    """Work the shape and the number of elements of a type, and of a tensor of that type, out once for equal shapes."""
    init_type, init_tensor = tl.block_type.__init__, tl.tensor.__init__

    @cache
    def type_of_shape(shape: tuple[int, ...]) -> Any:
        block_type = object.__new__(tl.block_type)
        init_type(block_type, tl.int32, list(shape))
        return block_type

    @cache
    def tensor_of_shape(shape: tuple[int, ...]) -> Any:
        tensor = object.__new__(tl.tensor)
        init_tensor(tensor, None, type_of_shape(shape) if shape else tl.int32)
        return tensor

    def init_type_by_shape(self: Any, element_ty: Any, shape: Any) -> None:
        same = type_of_shape(tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape))
        self.element_ty, self.shape, self.numel = element_ty, same.shape, same.numel
        self.name = f"<{same.shape}, {element_ty}>"

    def init_tensor_by_shape(self: Any, handle: Any, type: Any) -> None:
        same = tensor_of_shape(tuple(type.shape) if type.is_block() else ())
        self.handle, self.type, self.dtype, self.shape, self.numel = handle, type, type.scalar, same.shape, same.numel

    tl.block_type.__init__, tl.tensor.__init__ = init_type_by_shape, init_tensor_by_shape


def look_for_overflows_only_to_report_them() -> None:
    """Leave the search for overflows out where the interpreter discards what it finds."""
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)


look_for_overflows_only_to_report_them()
if knobs.runtime.interpret:  # compiled code has types too
    remember_shapes()
remember_dtypes()
patch_language_once()
serialize_kernels()  # outermost, as `replaced` is of one launch at a time
if triton.__version__.startswith("3.6."):
    patch_scalar_index()
