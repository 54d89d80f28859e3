"""The choices that decide, beside the arguments, which implementation a call runs; code that runs later keeps them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .size_ranges import Choice

_NO_CHOICES: Mapping[str, Choice] = MappingProxyType({})
EXPLICIT_CHOICES: ContextVar[Mapping[str, Choice]] = ContextVar("explicit_choices", default=_NO_CHOICES)  # set by `use`
# The next two are set by `default_choices`; None: outside of an engine.
DEFAULT_CHOICES: ContextVar[Mapping[str, Choice] | None] = ContextVar("default_choices", default=None)
BATCH_INVARIANT: ContextVar[bool] = ContextVar("batch_invariant", default=False)
CALL_COUNTER: ContextVar["Counter[tuple[str, str]] | None"] = ContextVar("call_counter", default=None)
# In the backward pass of a custom op, which torch may trace: a tensor that tells the choices of the forward pass.
COMPILED_CHOICES: ContextVar[Any] = ContextVar("compiled_choices", default=None)
_VARIABLES = (EXPLICIT_CHOICES, DEFAULT_CHOICES, BATCH_INVARIANT, CALL_COUNTER)


@dataclass(frozen=True)
class Policy:
    """The choices that hold at one place of a program. A backward pass, which may run after the `with` of `use` or in
    another thread, runs under those of its forward pass.
    """

    values: tuple[object, ...]

    @staticmethod
    def current() -> "Policy":
        return Policy(tuple(variable.get() for variable in _VARIABLES))

    def is_same_as(self, other: "Policy") -> bool:
        """Return True if both make the same choices, and count calls in the same counter."""
        (*choices, counter), (*other_choices, other_counter) = self.values, other.values
        return choices == other_choices and counter is other_counter

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run what is inside the `with` under these choices."""
        tokens = [variable.set(value) for variable, value in zip(_VARIABLES, self.values, strict=True)]  # pyright: ignore
        try:
            yield
        finally:
            for variable, token in zip(_VARIABLES, tokens, strict=True):
                variable.reset(token)  # pyright: ignore


class Recomputation(AbstractContextManager[None]):
    """A policy for a checkpoint, which enters it once for each backward pass."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self.entered.append(self.policy.active())
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.pop().__exit__(*error)


def keep_choices() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint`: what is run anew in the backward pass runs the
    implementations of the forward pass.
    """
    return nullcontext(), Recomputation(Policy.current())
