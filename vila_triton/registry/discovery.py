"""Files of ops and implementations are found where they lie, in vila_triton/ops/ and kernels/.

One that cannot be imported is named on standard error and skipped. Whatever is asked for and missing afterwards is
reported together with it.
"""

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from .domain import may_be
from .op import OPS
from .size_ranges import Choice, ChoiceByCase, implementation_names, parse_choice, rename_implementations

OLD_NAMES = {"apart": "unfused", "rows": "rowwise"}  # of implementations, accepted for one release
_problems: dict[str, str] = {}  # a module or an op -> file, line and reason; "" if it has none


def discover() -> list[str]:
    """Import every file of ops/ and kernels/, which attaches all implementations -> the modules of kernels/."""
    from vila_triton import kernels, ops

    ops.discover_ops()
    return import_modules(kernels)


def import_modules(package: ModuleType) -> list[str]:
    """Import every module of a package -> the names of those that could be; `problems` tells of the others."""
    imported = []
    for name in sorted(f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)):
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a file that somebody is editing may fail in any way
            unregister_module(name)
            record_problem(name, f"left aside: {describe_import_error(error, package)}")
        else:
            record_problem(name, "")
            imported.append(name)
    return imported


def record_problem(name: str, problem: str) -> None:
    """Record the problem of a module or an op, "" for none, and print one that is new to standard error."""
    if problem and problem not in _problems.values():
        print(f"vila-triton: {problem}", file=sys.stderr)
    _problems[name] = problem


def unregister_module(module: str) -> None:
    """Remove the ops and implementations that a module registered before it failed."""
    for name, op in list(OPS.items()):
        if op.reference.__module__ == module:
            del OPS[name]
        for impl in [impl for impl in op.impls.values() if impl.fn.__module__ == module]:
            del op.impls[impl.name]


def describe_import_error(error: BaseException, package: ModuleType) -> str:
    """The file and line of the package at which an import failed, and the reason."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(f.filename, f.lineno) for f in frames if os.path.dirname(f.filename) in package.__path__]
        file, line = places[-1] if places else (package.__name__, None)
        reason = (str(error) or "no reason given").splitlines()[0]
    relative = os.path.relpath(file)
    return f"{file if relative.startswith('..') else relative}, line {line}: {type(error).__name__}: {reason}"


def problems() -> list[str]:
    """The recorded problems, one sentence each."""
    return [problem for problem in dict.fromkeys(_problems.values()) if problem]


def describe_available(names: Iterable[str]) -> str:
    """The names that exist, for an error about one that does not, and the problems that may be the reason."""
    return "; ".join([", ".join(names), *problems()])


def validate_choices(choices: Mapping[str, Any]) -> dict[str, Choice]:
    """Parse choices by op, and check that every op and implementation they name exists.

    Raises KeyError for a name that does not exist, with those that do; ValueError for what is no choice.
    """
    return {name: _validate_choice(name, value) for name, value in choices.items()}


def _validate_choice(name: str, value: object) -> Choice:
    if name not in OPS:
        discover()
    if name not in OPS:
        raise KeyError(f"no op {name!r}; there are: {describe_available(sorted(OPS))}")
    op = OPS[name]
    if isinstance(value, str) and value in op.impls:
        return value
    try:
        choice = parse_choice(value)
    except ValueError as error:
        raise ValueError(f"op {name!r}: {error}") from None
    if not set(implementation_names(choice)) <= op.impls.keys():
        discover()
    choice = rename_implementations(choice, {k: v for k, v in OLD_NAMES.items() if k not in op.impls and v in op.impls})
    for impl in implementation_names(choice):
        if impl not in op.impls:
            raise KeyError(f"op {name!r} has no implementation {impl!r}; there are: {describe_available(op.impls)}")
    if not isinstance(choice, str) and not op.dynamic_sizes:
        raise ValueError(f"op {name!r} has no size that varies from call to call, expected one name, not ranges")
    for case in choice.cases if isinstance(choice, ChoiceByCase) else ():
        if unknown := [size for size, _ in case.sizes if size not in op.domain]:
            raise ValueError(f"op {name!r}: no size {unknown[0]!r} in a case; there are: {', '.join(op.domain)}")
        for size, values in case.sizes:
            if not values or not all(may_be(op.domain[size], x) for x in values):
                raise ValueError(f"op {name!r}: a case for {size} {list(values)}, expected values of {op.domain[size]}")
    return choice
