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

from .op import CHOSEN, DEFAULT, INVARIANT, OPS, RECORD, Op
from .size_ranges import Choice, Ranges, names, parse


def op(reference: Callable[..., Any] | None = None, *, exact: bool = False, batch_invariant: bool = False) -> Any:
    """Turn a plain-torch function into an `Op`. `exact=True`: implementations must agree with it bit for bit;
    `batch_invariant`: the reference is, on every device (see `Impl`).
    """
    if reference is None:
        return lambda fn: op(fn, exact=exact, batch_invariant=batch_invariant)
    OPS[reference.__name__] = Op(reference, exact, batch_invariant)
    return OPS[reference.__name__]


_broken: dict[str, str] = {}  # a module, or an op -> what is wrong with which line of which file


def discover() -> list[str]:
    """Import every file of `ops/` and of `kernels/`, so that each attaches its implementations; returns the names of
    the modules of kernels.
    """
    from vila_triton import kernels, ops

    ops.find()
    return load(kernels)


def load(package: ModuleType) -> list[str]:
    """Import every module of a package; returns their names, without those that fail, which `broken` is about."""
    loaded = []
    for name in sorted(f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)):
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a file that somebody is at work on may fail in any way
            forget(name)
            tell(name, f"left aside: {fault(error, package)}")
        else:
            tell(name, "")
            loaded.append(name)
    return loaded


def tell(name: str, wrong: str) -> None:
    """Keep what is wrong with a module or an op, and say it on standard error, once; "": nothing is any more."""
    if wrong and wrong not in _broken.values():
        print(f"vila-triton: {wrong}", file=sys.stderr)
    _broken[name] = wrong


def forget(module: str) -> None:
    """Take back the ops and implementations that a module registered before it failed."""
    for name, of in list(OPS.items()):
        if of.reference.__module__ == module:
            del OPS[name]
        for impl in [impl for impl in of.impls.values() if impl.fn.__module__ == module]:
            del of.impls[impl.name]


def fault(error: BaseException, package: ModuleType) -> str:
    """File and line of the package at which an import failed, and the reason."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        here = [frame for frame in frames if os.path.dirname(frame.filename) in package.__path__]
        file, line = (here[-1].filename, here[-1].lineno) if here else (package.__name__, None)
        reason = (str(error) or "no reason given").splitlines()[0]
    near = os.path.relpath(file)
    return f"{file if near.startswith('..') else near}, line {line}: {type(error).__name__}: {reason}"


def broken() -> list[str]:
    """What is wrong with files that were found, in words."""
    return [wrong for wrong in dict.fromkeys(_broken.values()) if wrong]


def there(names: Iterable[str]) -> str:
    """The names there are, for an error about one there is not: with the files it may be in that are `broken`."""
    return "; ".join([", ".join(names), *broken()])


def checked(choices: Mapping[str, Any]) -> dict[str, Choice]:
    """The same choices, parsed, once every op and implementation named in them is known to exist.

    Errors: KeyError for a name there is not, with those there are; ValueError for what is no choice.
    """
    return {name: _checked(name, value) for name, value in choices.items()}


def _checked(name: str, value: object) -> Choice:
    if name not in OPS:
        discover()
    if name not in OPS:
        raise KeyError(f"no op {name!r}; there are: {there(sorted(OPS))}")
    of = OPS[name]
    try:
        choice = parse(value)
    except ValueError as error:
        raise ValueError(f"op {name!r}: {error}") from None
    for impl in names(choice):
        if impl not in of.impls:
            discover()
        if impl not in of.impls:
            raise KeyError(f"op {name!r} has no implementation {impl!r}; there are: {there(of.impls)}")
    if isinstance(choice, Ranges) and not of.varying:
        raise ValueError(f"op {name!r} has no size that varies from call to call, expected one name, not ranges")
    return choice


def explicit() -> Mapping[str, Choice]:
    """What `use` says here and now."""
    return CHOSEN.get()


@contextmanager
def use(**choices: str | Sequence[Any]) -> Iterator[None]:
    """Run the named implementations inside the `with`: ``use(rope="triton", int4_matmul=[[4, "gemv"], "prefill"])``.

    Wins over `defaults`. It holds in this thread and this asyncio task. Another thread takes it along if it runs in a
    copy of the context, ``Thread(target=contextvars.copy_context().run, args=(answer,))`` inside the `with`. A
    generator that is left half-read goes on with what holds where it is read.

    What was cached under one choice serves another: both keep to the error budget. Only under the policy "invariant",
    where every bit counts, does a `chat.Talker` forget it.
    """
    token = CHOSEN.set({**CHOSEN.get(), **checked(choices)})
    try:
        yield
    finally:
        CHOSEN.reset(token)


@contextmanager
def defaults(choices: Mapping[str, Any], invariant: bool = False) -> Iterator[None]:
    """What runs inside the `with` where `use` says nothing.

    invariant: of an op that has implementations marked batch_invariant only those may run, with their first config.
    Errors: ValueError naming them if `choices` or `use` say otherwise.
    """
    choices = checked(choices)
    for name, choice in {**choices, **explicit()}.items() if invariant else ():
        OPS[name].check_invariant(choice)
    tokens = DEFAULT.set(choices), INVARIANT.set(invariant)
    try:
        yield
    finally:
        DEFAULT.reset(tokens[0])
        INVARIANT.reset(tokens[1])


@contextmanager
def recording() -> Iterator["Counter[tuple[str, str]]"]:
    """Count the calls made inside the `with`, by (op, implementation)."""
    counter: Counter[tuple[str, str]] = Counter()
    token = RECORD.set(counter)
    try:
        yield counter
    finally:
        RECORD.reset(token)
