"""The registry: an op is its plain-torch reference; implementations attach themselves to it from their own files.

    @op
    def rms_norm(x, weight, eps): ...                 # the meaning, the dispatch point and the oracle

    @rms_norm.requires                                # what every call must satisfy, checked before any implementation
    def _(x, weight, eps): axes("rms_norm", x=(x, "... e"), weight=(weight, "e"))

    @rms_norm.inputs                                  # the annotations are the domain tests and benches draw from
    def _(rows: Sizes(1, 64), dtype: OneOf("float32", "float16"), *, rng, device): return x, weight, eps

    @rms_norm.costs                                   # the same names -> (flops, bytes)
    def _(rows, dtype): return 4 * rows, 2 * rows

    @rms_norm.sizes("rows")                           # the inverse of inputs; rows varies from call to call
    def _(x, weight, eps): return {"rows": len(x), "e": len(weight)}

    @rms_norm.impl("triton", configs=[{"BLOCK": 128}], space=SPACE)   # in a file of kernels/
    def rms_norm_triton(x, weight, eps, *, BLOCK): ...

Calling ``rms_norm(x, weight, eps)`` runs what `use` chose, else what `defaults` says, else the reference. There are no
priorities and no fallback: an implementation that cannot serve a call raises `Unsupported` and the call fails.
"""

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .space import Space

REFERENCE = "reference"
OPS: dict[str, "Op"] = {}

_NONE: Mapping[str, str] = MappingProxyType({})
_chosen: ContextVar[Mapping[str, str]] = ContextVar("chosen", default=_NONE)
_default: ContextVar[Mapping[str, str]] = ContextVar("default", default=_NONE)
_record: ContextVar["Counter[tuple[str, str]] | None"] = ContextVar("record", default=None)


class Unsupported(ValueError):
    """Raised by an implementation, before it launches anything, with the reason it cannot serve this call."""


@dataclass(frozen=True)
class Sizes:
    """The integers low, low + step, ... up to high (inclusive)."""

    low: int
    high: int
    step: int = 1

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and value in range(self.low, self.high + 1, self.step)


class OneOf:
    """One of the listed values; the first is the simplest, towards which a failing case shrinks."""

    def __init__(self, *values: Any):
        self.values = values

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __repr__(self) -> str:
        return f"OneOf{self.values}"


@dataclass(frozen=True, eq=False)
class Impl:
    """One implementation of an op. A call runs the config it passes, else the one tuned for this device and these
    sizes (see `tuned`), else `configs[0]`. `space`: what there is to tune; without it, `configs`.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    configs: Sequence[Mapping[str, Any]]
    file: Path
    space: Space | None = None

    def __call__(self, *args: Any, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs, **(self.chosen(*args, **kwargs) if config is None else config))

    def chosen(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The config of a call that passes none."""
        if not self.space and len(self.configs) == 1:
            return self.configs[0]
        from . import tuned  # not at import: it needs torch

        return tuned.config(self, OPS[self.op].sizes_of, *args, **kwargs) or self.configs[0]


class Op:
    """A named operation: its reference, its domain, its cost and everything that implements it."""

    def __init__(self, reference: Callable[..., Any], exact: bool):
        self.name = reference.__name__
        self.reference = reference
        self.exact = exact  # implementations must equal the reference bit for bit
        self.impls: dict[str, Impl] = {}
        self.domain: dict[str, Sizes | OneOf] = {}
        self.contract: Callable[..., None] | None = None
        self.sizes_of: Callable[..., dict[str, Any]] | None = None
        self.varying: tuple[str, ...] = ()
        self.__doc__ = reference.__doc__
        self.impl(REFERENCE)(reference)

    def __repr__(self) -> str:
        return f"Op({self.name}: {', '.join(self.impls)})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.contract:
            self.contract(*args, **kwargs)
        impl = self.impls[self.choice()]
        if (record := _record.get()) is not None:
            record[self.name, impl.name] += 1
        return impl(*args, **kwargs)

    def choice(self) -> str:
        """The name of the implementation a call would run here and now."""
        return _chosen.get().get(self.name) or _default.get().get(self.name) or REFERENCE

    def impl(
        self, name: str, configs: Sequence[Mapping[str, Any]] = ({},), space: Space | None = None
    ) -> Callable[[Callable], Callable]:
        """Attach the decorated function as implementation `name`; a second file claiming the name is an error."""

        def attach(fn: Callable) -> Callable:
            file = Path(inspect.getfile(fn)).resolve()
            old = self.impls.get(name)
            if old and old.file != file:
                raise ValueError(f"{self.name}: implementation {name!r} of {file} is already taken by {old.file}")
            if not configs:
                raise ValueError(f"{self.name}: implementation {name!r} of {file} has an empty list of configs")
            self.impls[name] = Impl(self.name, name, fn, configs, file, space)
            return fn

        return attach

    def requires(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Register the contract of every call, whichever implementation runs: it raises ValueError or returns."""
        self.contract = fn
        return fn

    def inputs(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Register the builder of example arguments; the annotations of its sizes become `self.domain`."""
        self.domain = {
            p.name: p.annotation for p in inspect.signature(fn).parameters.values() if p.kind is not p.KEYWORD_ONLY
        }
        bad = [name for name, values in self.domain.items() if not isinstance(values, Sizes | OneOf)]
        if bad:
            raise TypeError(f"{self.name}.inputs: {', '.join(bad)} must be annotated with Sizes(...) or OneOf(...)")
        self.example = fn
        return fn

    def sizes(self, *varying: str) -> Callable[[Callable], Callable]:
        """Register the inverse of `inputs`: arguments -> sizes, from shapes and dtypes alone (it must not wait for the
        device). `varying`: the sizes that differ from call to call of one model; tuned tables hold ranges of them.
        """
        if bad := set(varying) - set(self.domain):
            raise TypeError(f"{self.name}.sizes: no size {', '.join(sorted(bad))}; there are {', '.join(self.domain)}")

        def attach(fn: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
            self.sizes_of, self.varying = fn, varying
            return fn

        return attach

    def costs(self, fn: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
        """Register (flops, bytes moved at least once) as a function of the names of `inputs`."""
        if list(inspect.signature(fn).parameters) != list(self.domain):
            raise TypeError(f"{self.name}.costs must take {', '.join(self.domain)}, as its inputs do")
        self.cost = fn
        return fn


def op(reference: Callable[..., Any] | None = None, *, exact: bool = False) -> Any:
    """Turn a plain-torch function into an `Op`. `exact=True`: implementations must agree with it bit for bit."""
    if reference is None:
        return lambda fn: op(fn, exact=exact)
    OPS[reference.__name__] = Op(reference, exact)
    return OPS[reference.__name__]


def discover() -> list[str]:
    """Import every file of `kernels/`, so that each attaches its implementation; returns the module names."""
    from vila_triton import kernels, ops  # noqa: F401 (ops: the list of all ops)

    names = sorted(f"{kernels.__name__}.{m.name}" for m in pkgutil.iter_modules(kernels.__path__))
    for name in names:
        importlib.import_module(name)
    return names


def checked(choices: Mapping[str, str]) -> Mapping[str, str]:
    """The same choices, once every op and implementation named in them is known to exist (else KeyError)."""
    for name, impl in choices.items():
        if name not in OPS:
            raise KeyError(f"no op {name!r}; there are: {', '.join(sorted(OPS))}")
        if impl not in OPS[name].impls:
            discover()
        if impl not in OPS[name].impls:
            raise KeyError(f"op {name!r} has no implementation {impl!r}; there are: {', '.join(OPS[name].impls)}")
    return choices


@contextmanager
def use(**choices: str) -> Iterator[None]:
    """Run the named implementations inside the `with`: ``use(int4_matmul="triton")``. Wins over `defaults`."""
    token = _chosen.set({**_chosen.get(), **checked(choices)})
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def defaults(choices: Mapping[str, str]) -> Iterator[None]:
    """What runs inside the `with` where `use` says nothing."""
    token = _default.set(checked(choices))
    try:
        yield
    finally:
        _default.reset(token)


@contextmanager
def recording() -> Iterator["Counter[tuple[str, str]]"]:
    """Count the calls made inside the `with`, by (op, implementation)."""
    counter: Counter[tuple[str, str]] = Counter()
    token = _record.set(counter)
    try:
        yield counter
    finally:
        _record.reset(token)
