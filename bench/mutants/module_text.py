"""Another text in place of a module, in a process that has not imported this yet."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def module_name(file: str) -> str:
    """Returns the dotted name of a file of kernels/ or vila_triton/, named relative to the repository."""
    parts = Path(file).with_suffix("").parts
    return ".".join(("vila_triton", *parts) if parts[0] == "kernels" else parts).removesuffix(".__init__")


class MutantFinder(importlib.abc.MetaPathFinder):
    """Finds one module in another file."""

    def __init__(self, name: str, file: Path):
        self.name, self.file = name, file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(fullname, self.file) if fullname == self.name else None


def replace_module_text(file: str, text: str, folder: Path) -> None:
    """Writes a text to a folder, where imports of the module of a file find it from now on; so does
    `inspect.getsource`, from which Triton's interpreter takes a kernel.

    Errors: ValueError if the module is imported already.
    """
    name = module_name(file)
    if name in sys.modules:
        raise ValueError(f"{name} is imported already, expected a process that has not imported it")
    path = folder / Path(file).name
    path.write_text(text)
    sys.meta_path.insert(0, MutantFinder(name, path))
