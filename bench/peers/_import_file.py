"""Import one file of an installed library, without the packages around it."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch


class PeerUnavailable(ImportError):
    """Raised while a peer is imported, with the reason it can do nothing on this machine."""


def import_single_file(name: str, **stubs: dict) -> ModuleType:
    """Import the module `name` of a library; its packages are searched, but their `__init__` is not executed.

    stubs  dotted name (with "__" for ".") -> names of a module that replaces the library's own
    Errors: ModuleNotFoundError if the library is not installed.

    Modules of the library that the file itself imports are found as usual. Nothing stays in `sys.modules`, where it
    would be taken for the whole library.
    """
    root = name.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        raise ModuleNotFoundError(f"No module named {root!r}", name=root)
    saved_modules = {key: module for key, module in sys.modules.items() if is_submodule(key, root)}
    for key in saved_modules:
        del sys.modules[key]
    finder = _EmptyPackageFinder(root)
    try:
        sys.meta_path.insert(0, finder)
        for key, content in stubs.items():
            stub = ModuleType(key.replace("__", "."))
            vars(stub).update(content)
            sys.modules[stub.__name__] = stub
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for key in [key for key in sys.modules if is_submodule(key, root)]:
            del sys.modules[key]
        sys.modules.update(saved_modules)


def is_submodule(name: str, root: str) -> bool:
    """Returns True if a dotted name is that of the package `root` or of a module below it."""
    return name == root or name.startswith(f"{root}.")


class _EmptyPackageFinder:
    """Finds the packages of a library as if each __init__ were empty, and its modules as they are."""

    def __init__(self, root: str):
        self.root = root

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if not is_submodule(name, self.root):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.submodule_search_locations is None:
            return spec
        package = ModuleSpec(name, None, is_package=True)
        package.submodule_search_locations = spec.submodule_search_locations
        return package


def require_cuda(peer: str) -> None:
    """PeerUnavailable unless there is a GPU, for kernels that are neither Triton nor compiled for a CPU."""
    if not torch.cuda.is_available():
        raise PeerUnavailable(f"{peer} needs a CUDA GPU, and torch sees none")
