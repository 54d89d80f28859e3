"""An op: its plain-torch reference, its domain, its cost, and every implementation of it (see `registry`)."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .search_space import Space
from .size_ranges import Choice

REFERENCE = "reference"
OPS: dict[str, "Op"] = {}

_NONE: Mapping[str, Choice] = MappingProxyType({})
CHOSEN: ContextVar[Mapping[str, Choice]] = ContextVar("chosen", default=_NONE)  # by `registry.use`
DEFAULT: ContextVar[Mapping[str, Choice] | None] = ContextVar("default", default=None)  # by `registry.defaults`
INVARIANT: ContextVar[bool] = ContextVar("invariant", default=False)  # by `registry.defaults`
RECORD: ContextVar["Counter[tuple[str, str]] | None"] = ContextVar("record", default=None)


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

    batch_invariant: a row of the result has the same bits whatever other rows there are, and wherever it lies among
    them, as long as the config is the same; of attention: it keeps what the policy "invariant" promises.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    configs: Sequence[Mapping[str, Any]]
    file: Path
    space: Space | None = None
    batch_invariant: bool = False

    def __call__(self, *args: Any, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs, **(self.chosen(*args, **kwargs) if config is None else config))

    def chosen(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The config of a call that passes none."""
        if INVARIANT.get():  # a tuned one would depend on the number of rows
            return self.configs[0]
        if not self.space and len(self.configs) == 1:
            return self.configs[0]
        from . import tuned_tables  # not at import: it needs torch

        return tuned_tables.config(self, OPS[self.op].sizes_of, *args, **kwargs) or self.configs[0]


class Op:
    """A named operation: its reference, its domain, its cost and everything that implements it."""

    def __init__(self, reference: Callable[..., Any], exact: bool, batch_invariant: bool = False):
        self.name = reference.__name__
        self.reference = reference
        self.exact = exact  # implementations must equal the reference bit for bit
        self.impls: dict[str, Impl] = {}
        self.domain: dict[str, Sizes | OneOf] = {}
        self.contract: Callable[..., None] | None = None
        self.in_range: Callable[..., None] | None = None
        self.example = self.absent("inputs")
        self.cost = self._no_cost = self.absent("costs")
        self.sizes_of: Callable[..., dict[str, Any]] | None = None
        self.varying: tuple[str, ...] = ()
        self.traced: Callable[..., Any] | None = None  # what `torch.compile` sees of a call
        self.tracing: Callable[[], bool] = lambda: False
        self.__doc__ = reference.__doc__
        self.impl(REFERENCE, batch_invariant=batch_invariant)(reference)

    def __repr__(self) -> str:
        return f"Op({self.name}: {', '.join(self.impls)})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.traced is not None and self.tracing():
            return self.traced(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments and run the implementation that is chosen here and now."""
        self.check(*args, **kwargs)
        impl = self.impls[self.choice(*args, **kwargs)]
        if (record := RECORD.get()) is not None:
            record[self.name, impl.name] += 1
        try:
            out = impl(*args, **kwargs)
        except Unsupported as reason:
            if self.name in CHOSEN.get() or isinstance(reason.__cause__, Unsupported):  # which says it already
                raise
            raise Unsupported(
                f'{reason} ({impl.name!r} runs here by default; `with use({self.name}="reference")` runs the reference)'
            ) from reason
        if impl.name == REFERENCE:
            return out
        from . import gradients  # not at import: it needs torch

        return gradients.told(self.name, impl.name, out, *args, *kwargs.values())

    def check(self, *args: Any, **kwargs: Any) -> None:
        """What every call is held to: the contract, and that what its indices name exists."""
        if self.contract:
            self.contract(*args, **kwargs)
        if self.in_range:
            self.in_range(*args, **kwargs)

    def choice(self, *args: Any, **kwargs: Any) -> str:
        """The name of the implementation a call with these arguments would run here and now."""
        defaults = DEFAULT.get()
        choice = CHOSEN.get().get(self.name)
        if choice is None:
            choice = self.usual(*args, **kwargs) if defaults is None else defaults.get(self.name, REFERENCE)
        if INVARIANT.get():
            self.check_invariant(choice)
        if isinstance(choice, str):
            return choice
        assert self.sizes_of  # as `registry.checked` has seen
        return choice.at(self.sizes_of(*args, **kwargs)[self.varying[0]])

    def usual(self, *args: Any, **kwargs: Any) -> Choice:
        """What a call outside an engine runs where `use` says nothing: what an engine would on the tensors' device."""
        from . import tuned_tables  # not at import: it needs torch

        policy = self.sizes_of(*args, **kwargs)["policy"] if self.sizes_of and "policy" in self.domain else "fast"
        return tuned_tables.usual(self.name, policy, *args, **kwargs)

    def check_invariant(self, choice: Choice) -> None:
        """ValueError unless the choice is one implementation marked batch_invariant, if any of the op's are."""
        marked = [impl.name for impl in self.impls.values() if impl.batch_invariant]
        if marked and choice not in marked:
            one = choice if isinstance(choice, str) else " or ".join(dict.fromkeys(choice.names)) + ", by size"
            raise ValueError(
                f'{self.name}: {one} is not allowed under the policy "invariant", expected one implementation that is '
                f"marked batch_invariant: {', '.join(marked)}"
            )

    def impl(
        self,
        name: str,
        configs: Sequence[Mapping[str, Any]] = ({},),
        space: Space | None = None,
        batch_invariant: bool = False,
    ) -> Callable[[Callable], Callable]:
        """Attach the decorated function as implementation `name`; a second file claiming the name is an error."""

        def attach(fn: Callable) -> Callable:
            file = Path(inspect.getfile(fn)).resolve()
            old = self.impls.get(name)
            if old and old.file != file:
                raise ValueError(f"{self.name}: implementation {name!r} of {file} is already taken by {old.file}")
            if not configs:
                raise ValueError(f"{self.name}: implementation {name!r} of {file} has an empty list of configs")
            self.impls[name] = Impl(self.name, name, fn, configs, file, space, batch_invariant)
            return fn

        return attach

    @property
    def file(self) -> Path:
        return self.impls[REFERENCE].file

    def absent(self, what: str) -> Callable[..., Any]:
        """In place of what has not been registered: NotImplementedError that says so."""

        def tell(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.file}: op {self.name!r} has no {what}, expected @{self.name}.{what}")

        return tell

    @property
    def missing(self) -> list[str]:
        """What has not been registered of all that an op has."""
        there = {
            "requires": self.contract,
            "inputs": self.domain,
            "sizes": self.sizes_of,
            "costs": self.cost is not self._no_cost,
            "result or writes": self.traced,
        }
        return [name for name, value in there.items() if not value]

    def requires(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Register the contract of every call, whichever implementation runs: it raises ValueError or returns."""
        fn.__qualname__ = self.name  # what Python calls it where arguments are missing
        self.contract = fn
        return fn

    def bounds(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Register what looks at the values of index arguments (see `ops.indices`): it raises IndexError or returns.

        Apart from the contract, since nothing but shapes is known while a model is traced.
        """
        self.in_range = fn
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

    def result(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Register what a call returns, arguments -> an empty tensor or a tuple of them, and with it a `torch.library`
        custom op (see `library`), which is what a call is while `torch.compile` traces it.
        """
        from . import custom_ops  # not at import: it needs torch

        self.traced, self.tracing = custom_ops.expose(self, fn), custom_ops.tracing
        return fn

    def writes(self, *names: str, result: Callable[..., tuple[Any, ...]] | None = None) -> None:
        """The same for an op that writes these arguments in place and returns them, in this order, after what `result`
        says it returns besides.
        """
        from . import custom_ops

        self.traced, self.tracing = custom_ops.expose(self, result, names), custom_ops.tracing
