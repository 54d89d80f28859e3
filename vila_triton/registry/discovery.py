"""Ops and implementations are found where they lie: in vila_triton/ops/ and kernels/, in modules that installed
distributions name, and in files and folders given by path; and choices are checked against what was found.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from .domain import may_be
from .imports import import_modules, problems, record_missing_parts
from .op import OPS
from .size_ranges import Choice, ChoiceByCase, implementation_names, parse_choice, rename_implementations
from .sources import check_path, import_installed, import_path, import_paths

OLD_NAMES = {"apart": "unfused", "rows": "rowwise"}  # of implementations, accepted for one release


def discover(*paths: str | PathLike[str]) -> list[str]:
    """Import all files of ops and kernels, which attaches every implementation -> the modules of implementations.

    These are the files of kernels/, the modules that installed distributions name, and the paths, of now and of earlier
    calls: .py files of one's own, or folders of them (see `sources`). A new op in such a file is found as well.

    Raises FileNotFoundError and ValueError for a path that is neither, before anything is imported; RuntimeError, with
    the line and the reason, for a file that is given itself and cannot be imported. Other files that cannot be are
    named on standard error and left aside.
    """
    for path in paths:
        check_path(path)
    from vila_triton import kernels, ops

    ops.discover_ops()
    modules = [*import_modules(kernels), *import_installed(), *import_paths()]
    for path in paths:
        modules += import_path(path)
    record_missing_parts()
    return list(dict.fromkeys(modules))


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
