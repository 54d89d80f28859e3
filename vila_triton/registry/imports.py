"""Imports of the files that hold ops and implementations, and the report of what is wrong with them.

One that cannot be imported is named on standard error and skipped. Whatever is asked for and missing afterwards is
reported together with it.
"""

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Collection
from types import ModuleType

from .op import OPS

ImportErrors = (Exception, SystemExit)  # a file that somebody is editing may fail in any way
MACHINERY = (os.path.dirname(__file__), os.path.dirname(importlib.__file__))  # files that import others
_problems: dict[str, str] = {}  # a module or an op -> file, line and reason; "" if it has none
_imported: set[str] = set()  # the modules that hold ops and implementations, or could


def import_modules(package: ModuleType) -> list[str]:
    """Import every module of a package -> the names of those that could be; `problems` tells of the others."""
    names = sorted(f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__))
    return [name for name in names if try_import(name, package.__path__, lambda name: importlib.import_module(name))]


def try_import(name: str, folders: Collection[str], load: Callable[[str], object], label: str = "") -> bool:
    """Call load(name) and return True; where that fails, record the problem and return False.

    folders: those of the files to look for the line in. label: a word about where the module comes from.
    """
    try:
        load(name)
    except ImportErrors as error:
        unregister_module(name)
        record_problem(name, f"left aside: {label}{describe_import_error(error, folders, name)}")
        return False
    record_import(name)
    return True


def record_import(name: str) -> None:
    """Record that a module was imported, and that it has no problem any more."""
    record_problem(name, "")
    _imported.add(name)


def record_problem(name: str, problem: str) -> None:
    """Record the problem of a module or an op, "" for none, and print one that is new to standard error."""
    if problem and problem not in _problems.values():
        print(f"vila-triton: {problem}", file=sys.stderr)
    _problems[name] = problem


def record_missing_parts() -> None:
    """Record the parts that an op lacks, of every op in a module that was imported here."""
    for name, op in OPS.items():
        if op.reference.__module__ in _imported:
            missing = ", ".join(op.missing_parts)
            record_problem(name, f"{op.file.name}: op {name!r} lacks {missing}" if missing else "")


def problems() -> list[str]:
    """The recorded problems, one sentence each."""
    return [problem for problem in dict.fromkeys(_problems.values()) if problem]


def unregister_module(module: str) -> None:
    """Remove the ops and implementations that a module registered before it failed."""
    for name, op in list(OPS.items()):
        if op.reference.__module__ == module:
            del OPS[name]
        for impl in [impl for impl in op.impls.values() if impl.fn.__module__ == module]:
            del op.impls[impl.name]


def describe_import_error(error: BaseException, folders: Collection[str], name: str) -> str:
    """The file and line at which the import of a module failed, and the reason.

    folders: the line is the last one in a file of these; empty: of the folder of the first file that was run.
    """
    if isinstance(error, SyntaxError) and error.filename:
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(f.filename, f.lineno) for f in frames if not f.filename.startswith(("<frozen", *MACHINERY))]
        within = folders or [os.path.dirname(file) for file, _ in places[:1]]
        places = [(file, line) for file, line in places if os.path.dirname(file) in within]
        file, line = places[-1] if places else (name, None)
        reason = (str(error) or "no reason given").splitlines()[0]
    where = f"{shown_path(file)}, line {line}" if line else file
    return f"{where}: {type(error).__name__}: {reason}"


def shown_path(file: str | os.PathLike[str]) -> str:
    """A path relative to the current folder, where it lies below it."""
    relative = os.path.relpath(file)
    return os.fspath(file) if relative.startswith("..") else relative
