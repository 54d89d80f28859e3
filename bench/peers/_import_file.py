"""One file of an installed library, without the packages around it."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch


class Unusable(ImportError):
    """Raised while a peer is imported, with the reason it can do nothing on this machine."""


def borrow(name: str, **stubs: dict) -> ModuleType:
    """Import the module `name` of a library whose packages are not executed, only searched.

    stubs  dotted name (with "__" for ".") -> the names a module has that stands in for the library's own
    Errors: ModuleNotFoundError if the library is not installed.

    So a kernel is had without what its package imports on the way. Modules of the library that the file itself imports
    are found as usual. Nothing stays in `sys.modules`, where it would be taken for the whole library.
    """
    root = name.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        raise ModuleNotFoundError(f"No module named {root!r}", name=root)
    kept = {key: module for key, module in sys.modules.items() if within(key, root)}
    for key in kept:
        del sys.modules[key]
    finder = _Bare(root)
    try:
        sys.meta_path.insert(0, finder)
        for key, content in stubs.items():
            stub = ModuleType(key.replace("__", "."))
            vars(stub).update(content)
            sys.modules[stub.__name__] = stub
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for key in [key for key in sys.modules if within(key, root)]:
            del sys.modules[key]
        sys.modules.update(kept)


def within(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


class _Bare:
    """Finds the packages of a library as if each __init__ were empty, and its modules as they are."""

    def __init__(self, root: str):
        self.root = root

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if not within(name, self.root):
            return None
        found = PathFinder.find_spec(name, path)
        if found is None or found.submodule_search_locations is None:
            return found
        bare = ModuleSpec(name, None, is_package=True)
        bare.submodule_search_locations = found.submodule_search_locations
        return bare


def needs_cuda(library: str) -> None:
    """Unusable unless there is a GPU for kernels that are neither Triton nor compiled for a CPU."""
    if not torch.cuda.is_available():
        raise Unusable(f"{library} needs a CUDA GPU, and torch sees none")
