"""The declaration of an op, by the decorators of the files in ops/: its plain-torch reference, its arguments and their
checks, the sizes and values it is tested at, its cost and its gradient.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .domain import IntRange, OneOf


class OpDeclaration:
    """All that is said of an op whatever implements it."""

    def __init__(self, reference: Callable[..., Any]):
        self.name = reference.__name__
        self.reference = reference
        self.signature = inspect.signature(reference)
        self.domain: dict[str, IntRange | OneOf] = {}
        self.precondition: Callable[..., None] | None = None
        self.index_check: Callable[..., None] | None = None
        self.hard_cases: dict[str, Callable[..., Any]] = {}
        self.make_example = self._not_registered("example_inputs")
        self.cost = self._missing_cost = self._not_registered("flops_and_bytes")
        self.sizes_of: Callable[..., dict[str, Any]] | None = None
        self.dynamic_sizes: tuple[str, ...] = ()
        self.gradient_rule: Callable[..., Any] | None = None  # None: torch differentiates the reference, run again
        self.gradient_refusal = ""  # the reason why no argument has a gradient
        self._saved: dict[str, tuple[str, ...]] = {}  # by `gradient`

    @property
    def file(self) -> Path:
        return Path(inspect.getfile(self.reference)).resolve()

    def _not_registered(self, decorator: str) -> Callable[..., Any]:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"{self.file}: op {self.name!r} has no {decorator}, expected @{self.name}.{decorator}"
            )

        return fail

    @property
    def missing_parts(self) -> list[str]:
        """The names of the decorators that have not been used, of all that an op has."""
        parts = {
            "requires": self.precondition,
            "example_inputs": self.domain,
            "sizes_from_args": self.sizes_of,
            "flops_and_bytes": self.cost is not self._missing_cost,
        }
        return [name for name, value in parts.items() if not value]

    def requires(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Register the check of shapes and dtypes before every call: it raises TypeError or ValueError, or returns."""
        fn.__qualname__ = self.name  # Python's own error for missing arguments then names the op
        self.precondition = fn
        return fn

    def bounds(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Register the check of the values of index arguments (see `ops.indices`): it raises IndexError or returns.

        It is separate from `requires` because only shapes and dtypes are known while a model is traced.
        """
        self.index_check = fn
        return fn

    def example_inputs(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Register the builder of example arguments; the annotations of its parameters become `self.domain`."""
        self.domain = {
            p.name: p.annotation for p in inspect.signature(fn).parameters.values() if p.kind is not p.KEYWORD_ONLY
        }
        if bad := ", ".join(name for name, x in self.domain.items() if not isinstance(x, IntRange | OneOf)):
            raise TypeError(f"{self.name}.example_inputs: {bad} must be annotated with IntRange(...) or OneOf(...)")
        self.make_example = fn
        return fn

    def hard_case(self, name: str) -> Callable[[Callable], Callable]:
        """Register a function of example arguments and a `torch.Generator` as a hard case of the op.

        It returns arguments of the same shapes and dtypes, of values that random ones do not meet; it may change those
        it gets. Raises ValueError for a name that is taken, as "random" is by the arguments as they were drawn.
        """

        def attach(fn: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
            if name in ("random", *self.hard_cases):
                raise ValueError(f"{self.name}: there already are example arguments that are called {name!r}")
            self.hard_cases[name] = fn
            return fn

        return attach

    def sizes_from_args(self, *dynamic_sizes: str) -> Callable[[Callable], Callable]:
        """Register the inverse of `example_inputs`: arguments -> sizes, from shapes and dtypes alone, since it must not
        wait for the device.

        dynamic_sizes: the sizes that differ from call to call of one model; tuned tables hold ranges of them.
        """
        if unknown := ", ".join(sorted(set(dynamic_sizes) - set(self.domain))):
            raise TypeError(f"{self.name}.sizes_from_args: no size {unknown}; there are {', '.join(self.domain)}")

        def attach(fn: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
            self.sizes_of, self.dynamic_sizes = fn, dynamic_sizes
            return fn

        return attach

    def flops_and_bytes(self, fn: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
        """Register the cost of a call: sizes, named as in `example_inputs` -> (flops, least bytes moved)."""
        if list(inspect.signature(fn).parameters) != list(self.domain):
            raise TypeError(f"{self.name}.flops_and_bytes must take {', '.join(self.domain)}, as example_inputs does")
        self.cost = fn
        return fn

    def gradient(self, **saved: str) -> Callable[[Callable], Callable]:
        """Register the rule of the gradients: ``@linear.gradient(x="w", w="x", bias="", residual="")``.

        saved: of each argument that can have a gradient, what its gradient is computed from, which autograd keeps:
        arguments, "out" for the result, and "lse" for the second result of a call with `return_lse`.
        The function gets these, `grad` of the result, `needs` (the names of the arguments whose gradient is asked for),
        and all arguments that hold no tensors, by keyword; the others are None. It returns a tuple of a gradient for
        each of `saved`, in this order; None will do where none is asked for. It should be made of ops, so that
        implementations can be chosen.
        """
        names = {name: tuple(text.split()) for name, text in saved.items()}
        results = ("out", "lse") if "return_lse" in self.signature.parameters else ("out",)
        arguments = tuple(self.signature.parameters)
        for allowed, used in ((arguments, names), ((*arguments, *results), [n for ns in names.values() for n in ns])):
            if unknown := ", ".join(sorted(set(used) - set(allowed))):
                raise TypeError(f"{self.name}.gradient: no {unknown}; there are {', '.join(allowed)}")

        def attach(fn: Callable[..., Any]) -> Callable[..., Any]:
            self.gradient_rule, self._saved = fn, names
            return fn

        return attach

    def no_gradient(self, reason: str) -> None:
        """Register that no argument has a gradient: a call with one that requires it raises RuntimeError, which says
        "but " and the reason.
        """
        self.gradient_refusal = reason

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arguments that can have a gradient."""
        if self.gradient_refusal:
            return ()
        return tuple(self._saved) or tuple(self.signature.parameters)

    def saved_for(self, name: str) -> tuple[str, ...]:
        """All that the gradient of an argument is computed from."""
        return self._saved[name] if self._saved else tuple(self.signature.parameters)

    @property
    def keeps_lse(self) -> bool:
        """True if gradients are computed from the log-sum-exp of the call."""
        return any("lse" in names for names in self._saved.values())
