"""Kernels and ops of others: in files and folders given by path, and in modules of installed distributions.

Their code is run as it is imported, with all that the user may do. So a path is named by who starts a process, in
`discover` or --kernels, and by nothing that is read: no checkpoint, config or table is asked for one.

The files of a folder are modules of a package that is named after a hash of its path, ``kernels_at_3f9a12c4d5e6.mine``:
files of one name in two folders are two modules, and a process that discovers the same path can unpickle what another
has pickled. In them ``from ._launch import grid`` finds the file beside them, else the one in kernels/, so that a copy
of one of our files runs as it is. A folder may have an `__init__.py`, which is run first.

A distribution names a module, or a package of which every module is imported, in its metadata:

    [project.entry-points."vila_triton.kernels"]
    mine = "my_kernels"
"""

import importlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import TypedDict

from ..hashing import short_hash
from .imports import (
    ImportErrors,
    describe_import_error,
    import_modules,
    record_import,
    record_problem,
    try_import,
    unregister_module,
)
from .op import OPS, Impl

ENTRY_POINT_GROUP = "vila_triton.kernels"
OWN_DISTRIBUTION = "vila-triton"
_paths: dict[Path, str] = {}  # a file or folder that was given -> as it was given


class Source(TypedDict):
    """Where an implementation came from: the file that --kernels names, "" for the distribution; else the file of it,
    as Python names its module.
    """

    distribution: str
    file: str


def kernel_paths() -> list[str]:
    """The absolute paths that were discovered, for a process that is to know the same implementations."""
    return [str(path) for path in _paths]


def check_path(path: str | PathLike[str]) -> Path:
    """Return the absolute path of a file or a folder of kernels. Raises FileNotFoundError if there is neither, and
    ValueError for what is no file of Python, and for a folder without one.
    """
    file = Path(path).expanduser().resolve()
    if not file.exists():
        expected = "expected a .py file with kernels, or a folder of them"
        raise FileNotFoundError(f"kernels {fspath(path)}: no such file or folder, {expected}")
    if file.is_dir() and not any(file.glob("*.py")):
        raise ValueError(f"kernels {fspath(path)}: there is no .py file in this folder")
    if not file.is_dir() and (file.suffix != ".py" or "." in file.stem):
        raise ValueError(f"kernels {fspath(path)}: expected a file NAME.py, without another dot in its name")
    return file


def import_path(path: str | PathLike[str]) -> list[str]:
    """Import a file, or every file of a folder, now and whenever kernels are discovered -> the modules.

    A file of a folder that cannot be imported is left aside, as those of kernels/ are. Raises what `check_path` raises,
    and RuntimeError naming file, line and reason for a file that was given itself and cannot be imported.
    """
    file = check_path(path)
    importlib.invalidate_caches()  # a file may have been written a moment ago
    if file.is_dir():
        modules = import_modules(folder_package(file))
    else:
        package = folder_package(file.parent)
        modules = [f"{package.__name__}.{file.stem}"]
        try:
            import_file(modules[0], file)
        except ImportErrors as error:
            unregister_module(modules[0])
            raise RuntimeError(describe_import_error(error, package.__path__, modules[0])) from error
        record_import(modules[0])
        if not registers(modules[0]):
            record_problem(modules[0], f"{fspath(path)} registers no op and no implementation")
    _paths.setdefault(file, fspath(path))
    return modules


def registers(module: str) -> bool:
    """Return whether a module has registered an op or an implementation."""
    functions = [fn for op in OPS.values() for fn in (op.reference, *(impl.fn for impl in op.impls.values()))]
    return any(fn.__module__ == module for fn in functions)


def import_file(name: str, file: Path) -> None:
    """Import one file under a name, unless that has been done."""
    spec = spec_from_file_location(name, file)
    assert spec and spec.loader
    if name not in sys.modules:
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise


def folder_package(folder: Path) -> ModuleType:
    """Return the package of which the files of a folder are modules, with the helpers of kernels/ that it lacks."""
    from vila_triton import kernels

    name = f"kernels_at_{short_hash(str(folder).encode())}"
    if name not in sys.modules:
        spec = ModuleSpec(name, None, is_package=True)
        if (init := folder / "__init__.py").exists():
            spec = spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
        assert spec and spec.submodule_search_locations is not None
        spec.submodule_search_locations[:] = [str(folder)]
        sys.modules[name] = module_from_spec(spec)
        if spec.loader:
            try:
                spec.loader.exec_module(sys.modules[name])
            except ImportErrors as error:
                del sys.modules[name]
                raise RuntimeError(describe_import_error(error, [str(folder)], name)) from error
    helpers = f"{kernels.__name__}._"
    for helper, module in [(m, module) for m, module in sys.modules.items() if m.startswith(helpers)]:
        stem = helper.rpartition(".")[2]
        if not (folder / f"{stem}.py").exists():
            sys.modules.setdefault(f"{name}.{stem}", module)
    return sys.modules[name]


def import_paths() -> list[str]:
    """Import the paths that were given before, what could not be imported then included -> their modules."""
    return [module for path in list(_paths) for module in import_path(path)]


@cache
def installed_kernels() -> tuple[EntryPoint, ...]:
    """The entry points of installed distributions that name modules with kernels."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def import_installed() -> list[str]:
    """Import the modules that installed distributions name -> those that could be; `imports.problems` tells of the
    others.
    """
    return [module for point in installed_kernels() for module in import_entry_point(point)]


def import_entry_point(point: EntryPoint) -> Iterator[str]:
    """Import the module, or the modules of the package, that an entry point names."""
    package: list[ModuleType] = []
    label = f"{distribution_name(point)}, {point.name} = {point.value}: "

    def load(name: str) -> None:
        if ":" in name:
            raise ValueError("expected a module or a package, without a name in it")
        package.append(importlib.import_module(name))

    if try_import(point.value, (), load, label):
        yield point.value
        if hasattr(package[0], "__path__"):
            yield from import_modules(package[0])


def distribution_name(point: EntryPoint) -> str:
    """Name and version of the distribution of an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def source_of(impl: Impl) -> Source:
    """Return where an implementation came from."""
    module = impl.fn.__module__
    as_module = f"{module.replace('.', '/')}.py"
    if module.startswith("vila_triton."):
        return {"distribution": OWN_DISTRIBUTION, "file": as_module}
    for point in installed_kernels():
        if module == point.value or module.startswith(f"{point.value}."):
            return {"distribution": distribution_name(point), "file": as_module}
    if given := _paths.get(impl.file):
        return {"distribution": "", "file": given}
    if given := _paths.get(impl.file.parent):
        return {"distribution": "", "file": fspath(Path(given) / impl.file.name)}
    return {"distribution": "", "file": impl.file.name}


def describe_missing(source: Source) -> str:
    """Say of an implementation that is not known here where it came from, and what makes it known."""
    file, distribution = source["file"], source["distribution"]
    if distribution == OWN_DISTRIBUTION:
        return f"of {file}, which {OWN_DISTRIBUTION} does not have (any more)"
    if distribution:
        return f"of {file} in {distribution}, which is not installed, or does not name it in {ENTRY_POINT_GROUP}"
    return f"of {file}, which is not loaded: pass --kernels {file}, or in Python call discover({file!r})"
