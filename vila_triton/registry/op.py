"""An op: its reference, every implementation of it, and the choice of the one that a call runs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from .declaration import OpDeclaration
from .policy import BATCH_INVARIANT, CALL_COUNTER, COMPILED_CHOICES, DEFAULT_CHOICES, EXPLICIT_CHOICES
from .search_space import Config, SearchSpace
from .size_ranges import Choice, implementation_at
from .target_configs import ConfigNumber, check_by_target, config_number, config_numbers, current_target, driver_in_use

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE = "reference"
MOST_DECISIONS = 4096  # that an op remembers
OPS: dict[str, "Op"] = {}
P = ParamSpec("P")
R = TypeVar("R")


@cache
def torch_part(name: str) -> ModuleType:
    """A module of this package that imports torch, which importing the registry does not."""
    return import_module(f".{name}", __package__)


class Unsupported(ValueError):
    """Raised by an implementation before it launches anything; the message is the reason it cannot serve this call."""


@dataclass(frozen=True, eq=False)
class Impl:
    """One implementation of an op.

    A call runs the config it passes; else the one tuned for its device and sizes (see `tuned_tables`); else that of
    `by_target` (see `target_configs`), which is `configs[0]` for targets that it does not name. With batch-invariant
    numerics (see `default_choices`) a call that passes none runs `configs[0]` where `by_target` has ranges of sizes.
    `space` holds the configs that can be tuned; without it, these are `configs`.

    batch_invariant: a row of the result has the same bits whatever other rows are in the batch and wherever it lies
    among them, as long as the config is the same; an attention does so with batch-invariant numerics only.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    configs: Sequence[Config]
    file: Path
    space: SearchSpace | None = None
    batch_invariant: bool = False
    by_target: Mapping[str, ConfigNumber] = field(default_factory=dict)

    def __call__(self, *args: Any, config: Config | None = None, **kwargs: Any) -> Any:
        """Run this implementation of itself, without a place in autograd's graph: RuntimeError if one is needed."""
        if self.name != REFERENCE and torch_part("gradients").requires_gradient(args, kwargs):
            raise RuntimeError(
                f"{self.op}: {self.name!r} has no gradient of itself, expected a call of the op in `use`"
            )
        return self.fn(*args, **kwargs, **(self.resolve_config(*args, **kwargs) if config is None else config))

    def resolve_config(self, *args: Any, **kwargs: Any) -> Config:
        """Return the config of a call that passes none."""
        if not self.space and len(self.configs) == 1:
            return self.configs[0]
        if BATCH_INVARIANT.get():  # nothing may depend on the number of rows
            choice = self.by_target.get(current_target() or "", 0) if self.by_target else 0
            return self.configs[choice if isinstance(choice, int) else 0]
        if tuned := OPS[self.op].defaults.config(self, *args, **kwargs):
            return tuned
        target = current_target() if self.by_target else None
        if isinstance(self.by_target.get(target or "", 0), int):
            return self.default_config(target, 1)
        op = OPS[self.op]
        assert op.sizes_of  # `Op.impl` has checked that there is a dynamic size
        return self.default_config(target, op.sizes_of(*args, **kwargs)[op.dynamic_sizes[0]])

    def default_config(self, target: str | None, size: int) -> Config:
        """Return the config of a target ("sm_90"; None: interpreted) at a size, the first of the dynamic ones."""
        return self.configs[config_number(self.by_target.get(target or "", 0), size)]

    def default_configs(self, target: str | None) -> list[Config]:
        """Return all configs that a target runs without a tuned table, each once, in the order of sizes."""
        return [self.configs[i] for i in dict.fromkeys(config_numbers(self.by_target.get(target or "", 0)))]

    def suits(self, number: int, target: str) -> bool:
        """Return False for a config that only other targets name in `by_target`: it may not fit this one."""
        named_for = {name for name, choice in self.by_target.items() if number in config_numbers(choice)}
        return number == 0 or not named_for or target in named_for


class Defaults:
    """Decides for calls that neither `use` nor an engine decides for. This one takes the reference and first configs.

    `registry.TunedDefaults`, which every registered op has, reads configs/kernels.toml and the tuned tables.
    """

    def choice(self, op: "Op", *args: Any, **kwargs: Any) -> Choice:
        return REFERENCE

    def config(self, impl: Impl, *args: Any, **kwargs: Any) -> Config | None:
        return None

    def table(self, *args: Any, **kwargs: Any) -> object:
        """Return what `config` goes by for the device of a call: another object once that has changed."""
        return None


class Op(OpDeclaration, Generic[P, R]):
    """A named operation: what is declared of it, everything that implements it, and the choice among that. To a type
    checker it is a function with the signature of its reference.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        bitwise_exact: bool,
        batch_invariant: bool = False,
        defaults: Defaults | None = None,
        autocasts: bool = False,
    ):
        super().__init__(reference)
        self.bitwise_exact = bitwise_exact  # implementations must equal the reference bit for bit
        self.autocasts = autocasts
        self.defaults = defaults or Defaults()
        self.impls: dict[str, Impl] = {}
        self._decisions: dict[Any, tuple[Impl, Config, Any, object, object]] = {}  # see `decide`
        self.custom_op: Callable[..., Any] | None = None  # what `torch.compile` sees of a call
        self.is_compiling: Callable[[], bool] = lambda: False
        self.__doc__ = reference.__doc__
        self.impl(REFERENCE, batch_invariant=batch_invariant)(reference)

    def __repr__(self) -> str:
        return f"Op({self.name}: {', '.join(self.impls)})"

    @overload  # a tensor or, with `return_lse`, two: Any lets a caller who knows which take it as that
    def __call__(
        self: "Op[P, Tensor | tuple[Tensor, Tensor]]", *args: P.args, **kwargs: P.kwargs
    ) -> "Tensor | Any": ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.custom_op is not None and (self.is_compiling() or COMPILED_CHOICES.get() is not None):
            return self.custom_op(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments and run the implementation that is chosen for this call; where an argument requires a
        gradient, as a node of autograd's graph (see `gradients`).
        """
        gradients = torch_part("gradients")
        if gradients.is_any_autocast_enabled() and (device := gradients.autocast_device(args, kwargs)):
            if self.autocasts:
                args, kwargs = gradients.cast_for_autocast(args, kwargs, device)
            with gradients.autocast(device, enabled=False):  # torch casts nothing inside
                return self.run(*args, **kwargs)
        if gradients.is_recording() and gradients.requires_gradient(args, kwargs):
            return gradients.run_recorded(self, args, kwargs)
        return self.run_decided(self.decide(args, kwargs), args, kwargs)

    def run_implementation(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of which neither autograd nor autocast is to see anything."""
        gradients = torch_part("gradients")
        if gradients.is_any_autocast_enabled() and (device := gradients.autocast_device(args, kwargs)):
            with gradients.autocast(device, enabled=False):
                return self.run_implementation(*args, **kwargs)
        return self.run_decided(self.decide(args, kwargs), args, kwargs)

    def run_decided(
        self, decision: tuple[Impl, Config, Any, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run what `decide` returned for a call."""
        impl, config, plans, tensors = decision
        if self.index_check:
            self.index_check(*args, **kwargs)
        if (counter := CALL_COUNTER.get()) is not None:
            counter[self.name, impl.name] += 1
        try:
            if plans is None:
                return impl.fn(*args, **kwargs, **config)
            return plans.run(impl.fn, args, kwargs, config, tensors)
        except Unsupported as reason:
            # The advice is left out where the caller chose, and where an op that this one calls has given it.
            if self.name in EXPLICIT_CHOICES.get() or isinstance(reason.__cause__, Unsupported):
                raise
            raise Unsupported(
                f'{reason} ({impl.name!r} runs here by default; `with use({self.name}="reference")` runs the reference)'
            ) from reason

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, in the order of the parameters, with defaults; raises TypeError for
        others than the op takes.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name} takes {', '.join(self.signature.parameters)}: {error}") from None
        bound.apply_defaults()
        return bound.arguments

    def decide(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Impl, Config, Any, Any]:
        """Return what a call runs, after the check of `requires`: the implementation, its config, and, if it launches
        kernels, its `LaunchPlans` and the tensors that the arguments hold.

        Calls of one signature (see `signature`) share a decision, until the tuned table or Triton's driver changes.
        """
        choice = self.choice_in_context()
        found = torch_part("signature").call_signature(args, kwargs) if choice is not None else None
        if found is None:
            return (*self._decide_afresh(args, kwargs), None, None)
        signature, tensors = found
        key, table = (choice, BATCH_INVARIANT.get(), signature), self.defaults.table(*args, **kwargs)
        decision = self._decisions.get(key)
        if decision is not None:
            impl, config, plans, driver, known_table = decision
            is_valid = known_table is table and self.impls.get(impl.name) is impl
            if is_valid and (not impl.by_target or driver_in_use() is driver):
                return impl, config, plans, tensors
        impl, config = self._decide_afresh(args, kwargs)
        plans = None if impl.name == REFERENCE else torch_part("launch_plans").LaunchPlans()
        if len(self._decisions) >= MOST_DECISIONS:
            self._decisions.clear()
        self._decisions[key] = impl, config, plans, driver_in_use() if impl.by_target else None, table
        return impl, config, plans, tensors

    def _decide_afresh(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Impl, Config]:
        if self.precondition:
            self.precondition(*args, **kwargs)
        impl = self.impls[self.choose_implementation(*args, **kwargs)]
        return impl, impl.resolve_config(*args, **kwargs)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Raise what `requires` and `bounds` raise for these arguments."""
        if self.precondition:
            self.precondition(*args, **kwargs)
        if self.index_check:
            self.index_check(*args, **kwargs)

    def choice_in_context(self) -> Choice | None:
        """Return the choice of `use` or of the engine around a call; None where there is neither."""
        choice = EXPLICIT_CHOICES.get().get(self.name)
        if choice is None and (defaults := DEFAULT_CHOICES.get()) is not None:
            return defaults.get(self.name, REFERENCE)
        return choice

    def choose_implementation(self, *args: Any, **kwargs: Any) -> str:
        """Return the name of the implementation that a call with these arguments runs."""
        choice = self.choice_in_context()
        if choice is None:
            choice = self.defaults.choice(self, *args, **kwargs)
        if BATCH_INVARIANT.get():
            self.check_batch_invariant(choice)
        if isinstance(choice, str):
            return choice
        assert self.sizes_of  # `discovery.validate_choices` has checked that there is a dynamic size
        sizes = self.sizes_of(*args, **kwargs)
        return implementation_at(choice, sizes[self.dynamic_sizes[0]], sizes)

    def check_batch_invariant(self, choice: Choice) -> None:
        """Raise ValueError unless the choice is one batch-invariant implementation, if the op has any of these."""
        allowed = [impl.name for impl in self.impls.values() if impl.batch_invariant]
        if allowed and choice not in allowed:
            description = choice if isinstance(choice, str) else " or ".join(dict.fromkeys(choice.names)) + ", by size"
            raise ValueError(
                f"{self.name}: {description} is not allowed with batch-invariant numerics, expected one implementation "
                f"that is marked batch_invariant: {', '.join(allowed)}"
            )

    def impl(
        self,
        name: str,
        configs: Sequence[Config] = ({},),
        space: SearchSpace | None = None,
        batch_invariant: bool = False,
        by_target: Mapping[str, ConfigNumber] | None = None,
    ) -> Callable[[Callable], Callable]:
        """Attach the decorated function as implementation `name`.

        configs: keyword arguments of the function, the first the default. space: what `bench.tune` searches.
        batch_invariant: see `Impl`. by_target: the default configs of architectures, see `target_configs`.
        Raises ValueError if another file has attached an implementation of that name, if there are no configs, and for
        targets and configs that do not exist.
        """

        def attach(fn: Callable) -> Callable:
            file = Path(inspect.getfile(fn)).resolve()
            existing = self.impls.get(name)
            if existing and existing.file != file:
                raise ValueError(f"{self.name}: implementation {name!r} of {file} is already taken by {existing.file}")
            if not configs:
                raise ValueError(f"{self.name}: implementation {name!r} of {file} has an empty list of configs")
            choices = by_target or {}
            try:
                check_by_target(choices, len(configs), bool(self.dynamic_sizes))
            except ValueError as error:
                raise ValueError(f"{self.name}: implementation {name!r} of {file}: {error}") from None
            self.impls[name] = Impl(self.name, name, fn, configs, file, space, batch_invariant, choices)
            return fn

        return attach

    def requires(self, fn: Callable[..., None]) -> Callable[..., None]:
        self._decisions.clear()
        return super().requires(fn)

    @property
    def missing_parts(self) -> list[str]:
        return super().missing_parts + ([] if self.custom_op else ["fake_impl or mutates"])

    def fake_impl(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Register a function of the op's arguments that returns an empty tensor, or a tuple of them, shaped as the
        result.

        With it a call becomes a `torch.library` custom op wherever `torch.compile` traces it (see `custom_ops`).
        """
        self._register_custom_op(fn)
        return fn

    def mutates(self, *names: str, fake_impl: Callable[..., tuple[Any, ...]] | None = None) -> None:
        """Register, as `fake_impl` does, an op that writes the arguments `names` in place.

        It returns them, in this order, after the new tensors that `fake_impl` makes, if there are any. It has no
        gradient, since torch cannot record what is written.
        """
        self.no_gradient(f"what is written to {names[-1]} keeps none")
        self._register_custom_op(fake_impl, names)

    def _register_custom_op(self, fake_impl: Callable[..., Any] | None, mutated: tuple[str, ...] = ()) -> None:
        from . import custom_ops  # not at import: it needs torch

        self.custom_op = custom_ops.CustomOp(self, fake_impl, mutated)
        self.is_compiling = custom_ops.is_compiling
