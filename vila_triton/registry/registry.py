"""The table of ops, which of their implementations run (`use`, `defaults`), and where files of them are found."""

import importlib
import os
import pkgutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .op import BATCH_INVARIANT, CALL_COUNTER, DEFAULT_CHOICES, EXPLICIT_CHOICES, OPS, Op
from .size_ranges import Choice, ChoiceBySize, implementation_names, parse_choice


def op(
    reference: Callable[..., Any] | None = None, *, bitwise_exact: bool = False, batch_invariant: bool = False
) -> Any:
    """Turn a plain-torch function into an `Op`. `exact=True`: implementations must agree with it bit for bit;
    `batch_invariant`: the reference is, on every device (see `Impl`).
    """
    if reference is None:
        return lambda fn: op(fn, bitwise_exact=bitwise_exact, batch_invariant=batch_invariant)
    OPS[reference.__name__] = Op(reference, bitwise_exact, batch_invariant)
    return OPS[reference.__name__]


_problems: dict[str, str] = {}  # a module, or an op -> what is wrong with which line of which file


def discover() -> list[str]:
    """Import every file of `ops/` and of `kernels/`, so that each attaches its implementations; returns the names of
    the modules of kernels.
    """
    from vila_triton import kernels, ops

    ops.discover_ops()
    return import_modules(kernels)


def import_modules(package: ModuleType) -> list[str]:
    """Import every module of a package; returns their names, without those that fail, which `broken` is about."""
    imported = []
    for name in sorted(f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)):
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a file that somebody is at work on may fail in any way
            unregister_module(name)
            record_problem(name, f"left aside: {describe_import_error(error, package)}")
        else:
            record_problem(name, "")
            imported.append(name)
    return imported


def record_problem(name: str, problem: str) -> None:
    """Keep what is wrong with a module or an op, and say it on standard error, once; "": nothing is any more."""
    if problem and problem not in _problems.values():
        print(f"vila-triton: {problem}", file=sys.stderr)
    _problems[name] = problem


def unregister_module(module: str) -> None:
    """Take back the ops and implementations that a module registered before it failed."""
    for name, registered_op in list(OPS.items()):
        if registered_op.reference.__module__ == module:
            del OPS[name]
        for impl in [impl for impl in registered_op.impls.values() if impl.fn.__module__ == module]:
            del registered_op.impls[impl.name]


def describe_import_error(error: BaseException, package: ModuleType) -> str:
    """File and line of the package at which an import failed, and the reason."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        package_frames = [frame for frame in frames if os.path.dirname(frame.filename) in package.__path__]
        file, line = (
            (package_frames[-1].filename, package_frames[-1].lineno) if package_frames else (package.__name__, None)
        )
        reason = (str(error) or "no reason given").splitlines()[0]
    relative_path = os.path.relpath(file)
    return f"{file if relative_path.startswith('..') else relative_path}, line {line}: {type(error).__name__}: {reason}"


def problems() -> list[str]:
    """What is wrong with files that were found, in words."""
    return [problem for problem in dict.fromkeys(_problems.values()) if problem]


def describe_available(names: Iterable[str]) -> str:
    """The names there are, for an error about one there is not: with the files it may be in that are `broken`."""
    return "; ".join([", ".join(names), *problems()])


def validate_choices(choices: Mapping[str, Any]) -> dict[str, Choice]:
    """The same choices, parsed, once every op and implementation named in them is known to exist.

    Errors: KeyError for a name there is not, with those there are; ValueError for what is no choice.
    """
    return {name: _validate_choice(name, value) for name, value in choices.items()}


def _validate_choice(name: str, value: object) -> Choice:
    if name not in OPS:
        discover()
    if name not in OPS:
        raise KeyError(f"no op {name!r}; there are: {describe_available(sorted(OPS))}")
    registered_op = OPS[name]
    try:
        choice = parse_choice(value)
    except ValueError as error:
        raise ValueError(f"op {name!r}: {error}") from None
    for impl in implementation_names(choice):
        if impl not in registered_op.impls:
            discover()
        if impl not in registered_op.impls:
            raise KeyError(
                f"op {name!r} has no implementation {impl!r}; there are: {describe_available(registered_op.impls)}"
            )
    if isinstance(choice, ChoiceBySize) and not registered_op.dynamic_sizes:
        raise ValueError(f"op {name!r} has no size that varies from call to call, expected one name, not ranges")
    return choice


def explicit_choices() -> Mapping[str, Choice]:
    """What `use` says here and now."""
    return EXPLICIT_CHOICES.get()


@contextmanager
def use(**choices: str | Sequence[Any]) -> Iterator[None]:
    """Run the named implementations inside the `with`: ``use(rope="triton", int4_matmul=[[4, "gemv"], "prefill"])``.

    Wins over `defaults`. It holds in this thread and this asyncio task. Another thread takes it along if it runs in a
    copy of the context, ``Thread(target=contextvars.copy_context().run, args=(answer,))`` inside the `with`. A
    generator that is left half-read goes on with what holds where it is read.

    What was cached under one choice serves another: both keep to the error budget. Only under the policy "invariant",
    where every bit counts, does a `chat.Talker` forget it.
    """
    token = EXPLICIT_CHOICES.set({**EXPLICIT_CHOICES.get(), **validate_choices(choices)})
    try:
        yield
    finally:
        EXPLICIT_CHOICES.reset(token)


@contextmanager
def default_choices(choices: Mapping[str, Any], batch_invariant: bool = False) -> Iterator[None]:
    """What runs inside the `with` where `use` says nothing.

    invariant: of an op that has implementations marked batch_invariant only those may run, with their first config.
    Errors: ValueError naming them if `choices` or `use` say otherwise.
    """
    choices = validate_choices(choices)
    for name, choice in {**choices, **explicit_choices()}.items() if batch_invariant else ():
        OPS[name].check_batch_invariant(choice)
    tokens = DEFAULT_CHOICES.set(choices), BATCH_INVARIANT.set(batch_invariant)
    try:
        yield
    finally:
        DEFAULT_CHOICES.reset(tokens[0])
        BATCH_INVARIANT.reset(tokens[1])


@contextmanager
def count_calls() -> Iterator["Counter[tuple[str, str]]"]:
    """Count the calls made inside the `with`, by (op, implementation)."""
    counter: Counter[tuple[str, str]] = Counter()
    token = CALL_COUNTER.set(counter)
    try:
        yield counter
    finally:
        CALL_COUNTER.reset(token)
