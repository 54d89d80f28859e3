"""An op: its plain-torch reference, its domain, its cost, and every implementation of it (see `registry`)."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .search_space import SearchSpace
from .size_ranges import Choice

REFERENCE = "reference"
OPS: dict[str, "Op"] = {}

_NO_CHOICES: Mapping[str, Choice] = MappingProxyType({})
EXPLICIT_CHOICES: ContextVar[Mapping[str, Choice]] = ContextVar("chosen", default=_NO_CHOICES)  # by `registry.use`
DEFAULT_CHOICES: ContextVar[Mapping[str, Choice] | None] = ContextVar("default", default=None)  # by `registry.defaults`
BATCH_INVARIANT: ContextVar[bool] = ContextVar("invariant", default=False)  # by `registry.defaults`
CALL_COUNTER: ContextVar["Counter[tuple[str, str]] | None"] = ContextVar("record", default=None)


class Unsupported(ValueError):
    """Raised by an implementation, before it launches anything, with the reason it cannot serve this call."""


@dataclass(frozen=True)
class IntRange:
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
    space: SearchSpace | None = None
    batch_invariant: bool = False

    def __call__(self, *args: Any, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs, **(self.resolve_config(*args, **kwargs) if config is None else config))

    def resolve_config(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The config of a call that passes none."""
        if BATCH_INVARIANT.get():  # a tuned one would depend on the number of rows
            return self.configs[0]
        if not self.space and len(self.configs) == 1:
            return self.configs[0]
        from . import tuned_tables  # not at import: it needs torch

        return tuned_tables.tuned_config(self, OPS[self.op].sizes_of, *args, **kwargs) or self.configs[0]


class Op:
    """A named operation: its reference, its domain, its cost and everything that implements it."""

    def __init__(self, reference: Callable[..., Any], bitwise_exact: bool, batch_invariant: bool = False):
        self.name = reference.__name__
        self.reference = reference
        self.bitwise_exact = bitwise_exact  # implementations must equal the reference bit for bit
        self.impls: dict[str, Impl] = {}
        self.domain: dict[str, IntRange | OneOf] = {}
        self.precondition: Callable[..., None] | None = None
        self.index_check: Callable[..., None] | None = None
        self.make_example = self.not_registered("inputs")
        self.cost = self._missing_cost = self.not_registered("costs")
        self.sizes_of: Callable[..., dict[str, Any]] | None = None
        self.dynamic_sizes: tuple[str, ...] = ()
        self.custom_op: Callable[..., Any] | None = None  # what `torch.compile` sees of a call
        self.is_compiling: Callable[[], bool] = lambda: False
        self.__doc__ = reference.__doc__
        self.impl(REFERENCE, batch_invariant=batch_invariant)(reference)

    def __repr__(self) -> str:
        return f"Op({self.name}: {', '.join(self.impls)})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.custom_op is not None and self.is_compiling():
            return self.custom_op(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments and run the implementation that is chosen here and now."""
        self.check(*args, **kwargs)
        impl = self.impls[self.choose_implementation(*args, **kwargs)]
        if (counter := CALL_COUNTER.get()) is not None:
            counter[self.name, impl.name] += 1
        try:
            out = impl(*args, **kwargs)
        except Unsupported as reason:
            if self.name in EXPLICIT_CHOICES.get() or isinstance(
                reason.__cause__, Unsupported
            ):  # which says it already
                raise
            raise Unsupported(
                f'{reason} ({impl.name!r} runs here by default; `with use({self.name}="reference")` runs the reference)'
            ) from reason
        if impl.name == REFERENCE:
            return out
        from . import gradients  # not at import: it needs torch

        return gradients.forbid_gradient(self.name, impl.name, out, *args, *kwargs.values())

    def check(self, *args: Any, **kwargs: Any) -> None:
        """What every call is held to: the contract, and that what its indices name exists."""
        if self.precondition:
            self.precondition(*args, **kwargs)
        if self.index_check:
            self.index_check(*args, **kwargs)

    def choose_implementation(self, *args: Any, **kwargs: Any) -> str:
        """The name of the implementation a call with these arguments would run here and now."""
        defaults = DEFAULT_CHOICES.get()
        choice = EXPLICIT_CHOICES.get().get(self.name)
        if choice is None:
            choice = self.default_choice(*args, **kwargs) if defaults is None else defaults.get(self.name, REFERENCE)
        if BATCH_INVARIANT.get():
            self.check_batch_invariant(choice)
        if isinstance(choice, str):
            return choice
        assert self.sizes_of  # as `registry.checked` has seen
        return choice.lookup(self.sizes_of(*args, **kwargs)[self.dynamic_sizes[0]])

    def default_choice(self, *args: Any, **kwargs: Any) -> Choice:
        """What a call outside an engine runs where `use` says nothing: what an engine would on the tensors' device."""
        from . import tuned_tables  # not at import: it needs torch

        numerics = self.sizes_of(*args, **kwargs)["numerics"] if self.sizes_of and "numerics" in self.domain else "fast"
        return tuned_tables.default_choice(self.name, numerics, *args, **kwargs)

    def check_batch_invariant(self, choice: Choice) -> None:
        """ValueError unless the choice is one implementation marked batch_invariant, if any of the op's are."""
        allowed = [impl.name for impl in self.impls.values() if impl.batch_invariant]
        if allowed and choice not in allowed:
            description = choice if isinstance(choice, str) else " or ".join(dict.fromkeys(choice.names)) + ", by size"
            raise ValueError(
                f'{self.name}: {description} is not allowed under the policy "invariant", expected one implementation that is '
                f"marked batch_invariant: {', '.join(allowed)}"
            )

    def impl(
        self,
        name: str,
        configs: Sequence[Mapping[str, Any]] = ({},),
        space: SearchSpace | None = None,
        batch_invariant: bool = False,
    ) -> Callable[[Callable], Callable]:
        """Attach the decorated function as implementation `name`; a second file claiming the name is an error."""

        def attach(fn: Callable) -> Callable:
            file = Path(inspect.getfile(fn)).resolve()
            existing = self.impls.get(name)
            if existing and existing.file != file:
                raise ValueError(f"{self.name}: implementation {name!r} of {file} is already taken by {existing.file}")
            if not configs:
                raise ValueError(f"{self.name}: implementation {name!r} of {file} has an empty list of configs")
            self.impls[name] = Impl(self.name, name, fn, configs, file, space, batch_invariant)
            return fn

        return attach

    @property
    def file(self) -> Path:
        return self.impls[REFERENCE].file

    def not_registered(self, decorator: str) -> Callable[..., Any]:
        """In place of what has not been registered: NotImplementedError that says so."""

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"{self.file}: op {self.name!r} has no {decorator}, expected @{self.name}.{decorator}"
            )

        return fail

    @property
    def missing_parts(self) -> list[str]:
        """What has not been registered of all that an op has."""
        parts = {
            "requires": self.precondition,
            "inputs": self.domain,
            "sizes": self.sizes_of,
            "costs": self.cost is not self._missing_cost,
            "result or writes": self.custom_op,
        }
        return [name for name, value in parts.items() if not value]

    def requires(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Register the contract of every call, whichever implementation runs: it raises ValueError or returns."""
        fn.__qualname__ = self.name  # what Python calls it where arguments are missing
        self.precondition = fn
        return fn

    def bounds(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Register what looks at the values of index arguments (see `ops.indices`): it raises IndexError or returns.

        Apart from the contract, since nothing but shapes is known while a model is traced.
        """
        self.index_check = fn
        return fn

    def inputs(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Register the builder of example arguments; the annotations of its sizes become `self.domain`."""
        self.domain = {
            p.name: p.annotation for p in inspect.signature(fn).parameters.values() if p.kind is not p.KEYWORD_ONLY
        }
        unannotated = [name for name, values in self.domain.items() if not isinstance(values, IntRange | OneOf)]
        if unannotated:
            raise TypeError(
                f"{self.name}.inputs: {', '.join(unannotated)} must be annotated with Sizes(...) or OneOf(...)"
            )
        self.make_example = fn
        return fn

    def sizes(self, *dynamic_sizes: str) -> Callable[[Callable], Callable]:
        """Register the inverse of `inputs`: arguments -> sizes, from shapes and dtypes alone (it must not wait for the
        device). `varying`: the sizes that differ from call to call of one model; tuned tables hold ranges of them.
        """
        if unknown := set(dynamic_sizes) - set(self.domain):
            raise TypeError(
                f"{self.name}.sizes: no size {', '.join(sorted(unknown))}; there are {', '.join(self.domain)}"
            )

        def attach(fn: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
            self.sizes_of, self.dynamic_sizes = fn, dynamic_sizes
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

        self.custom_op, self.is_compiling = custom_ops.register_custom_op(self, fn), custom_ops.is_compiling
        return fn

    def writes(self, *names: str, fake_impl: Callable[..., tuple[Any, ...]] | None = None) -> None:
        """The same for an op that writes these arguments in place and returns them, in this order, after what `result`
        says it returns besides.
        """
        from . import custom_ops

        self.custom_op, self.is_compiling = (
            custom_ops.register_custom_op(self, fake_impl, names),
            custom_ops.is_compiling,
        )
