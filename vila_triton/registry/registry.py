"""The decorator that makes an op, and the choice of the implementations that run: `use` and `default_choices`."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

from .discovery import validate_choices
from .op import OPS, Defaults, Impl, Op, P, R, torch_part
from .policy import BATCH_INVARIANT, CALL_COUNTER, DEFAULT_CHOICES, EXPLICIT_CHOICES
from .search_space import Config
from .size_ranges import Choice


class TunedDefaults(Defaults):
    """Decides as configs/kernels.toml and the tuned tables say for the device of a call."""

    def choice(self, op: Op, *args: Any, **kwargs: Any) -> Choice:
        return torch_part("tuned_tables").default_choice(op, *args, **kwargs)

    def config(self, impl: Impl, *args: Any, **kwargs: Any) -> Config | None:
        return torch_part("tuned_tables").tuned_config(impl, *args, **kwargs)

    def table(self, *args: Any, **kwargs: Any) -> object:
        return torch_part("tuned_tables").table_of(*args, **kwargs)


@overload
def op(reference: Callable[P, R]) -> Op[P, R]: ...
@overload
def op(
    *, bitwise_exact: bool = False, batch_invariant: bool = False, autocasts: bool = False
) -> Callable[[Callable[P, R]], Op[P, R]]: ...
def op(
    reference: Callable[..., Any] | None = None,
    *,
    bitwise_exact: bool = False,
    batch_invariant: bool = False,
    autocasts: bool = False,
) -> Op | Callable[[Callable[..., Any]], Op]:
    """Turn a plain-torch function into an `Op`.

    bitwise_exact: every implementation must equal the reference bit for bit.
    batch_invariant: the reference is batch-invariant on every device (see `Impl`).
    autocasts: `torch.autocast` casts its arguments, as it does those of torch's products.
    Raises ValueError if another file has an op of that name.
    """

    def register(fn: Callable[..., Any]) -> Op:
        new_op, existing = Op(fn, bitwise_exact, batch_invariant, TunedDefaults(), autocasts), OPS.get(fn.__name__)
        if existing and existing.file != new_op.file:
            raise ValueError(f"op {new_op.name!r} of {new_op.file} is already taken by {existing.file}")
        OPS[new_op.name] = new_op
        return new_op

    return register if reference is None else register(reference)


@contextmanager
def use(**choices: str | Sequence[Any]) -> Iterator[None]:
    """Run the named implementations inside the `with`: ``use(rope="triton", int4_matmul=[[4, "gemv"], "prefill"])``.

    This overrides every default, in this thread and this asyncio task. Another thread follows if it runs in a copy of
    the context, ``Thread(target=contextvars.copy_context().run, args=(answer,))`` inside the `with`. A generator that
    is left half-read continues with what holds where it is read.

    A KV cache that was written under one choice stays valid under another, since both keep to the error budget. Only
    with batch-invariant numerics, where every bit counts, a `chat.conversation.ChatModel` drops its cache.
    """
    token = EXPLICIT_CHOICES.set({**EXPLICIT_CHOICES.get(), **validate_choices(choices)})
    try:
        yield
    finally:
        EXPLICIT_CHOICES.reset(token)


@contextmanager
def default_choices(choices: Mapping[str, Any], batch_invariant: bool = False) -> Iterator[None]:
    """Run these implementations inside the `with`, wherever `use` names none; ops that are not named, their references.

    batch_invariant: an op with batch-invariant implementations runs one of these, with its first config. Raises
    ValueError naming them if `choices` or `use` choose another.
    """
    choices = validate_choices(choices)
    for name, choice in {**choices, **EXPLICIT_CHOICES.get()}.items() if batch_invariant else ():
        OPS[name].check_batch_invariant(choice)
    tokens = DEFAULT_CHOICES.set(choices), BATCH_INVARIANT.set(batch_invariant)
    try:
        yield
    finally:
        DEFAULT_CHOICES.reset(tokens[0])
        BATCH_INVARIANT.reset(tokens[1])


def explicit_choices() -> Mapping[str, Choice]:
    """The choices of the enclosing `use` blocks."""
    return EXPLICIT_CHOICES.get()


@contextmanager
def count_calls() -> Iterator["Counter[tuple[str, str]]"]:
    """Count the calls of ops inside the `with`, by (op, implementation)."""
    counter: Counter[tuple[str, str]] = Counter()
    token = CALL_COUNTER.set(counter)
    try:
        yield counter
    finally:
        CALL_COUNTER.reset(token)
