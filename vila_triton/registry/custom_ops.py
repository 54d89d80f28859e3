"""Every op as a `torch.library` custom op, `torch.ops.vila_triton.NAME`, which torch traces as one opaque node.

While `torch.compile` traces, a call of an op becomes a call of its custom op, and `Op.fake_impl` and `Op.mutates` tell
torch its results. The implementation is chosen when the compiled code runs, as for any call, so another choice compiles
nothing anew. A captured CUDA graph keeps the kernels it was captured with.

The schema is read off the annotations of the reference:

    Tensor, Tensor | None, int, float, bool, str   the same type
    a dataclass, as `Int4` or `PagedKV`            its fields one after the other, each named NAME_FIELD
    Tensor | a dataclass, also as a field          a Tensor; a call with the dataclass is traced through the reference

A reference returns a Tensor or a tuple of Tensors, the arguments it writes in place last. One with `return_lse` returns
two tensors here, of which the log-sum-exp is empty unless it is asked for. Results are contiguous.

Gradients are those of `gradients`, made of custom ops. Where one is needed the choices are a value of the traced code,
too: the number of a `Policy`, by `torch.ops.vila_triton.current_choices`, which ops get as their last argument,
`choices`, those of the backward pass that of the forward pass.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gradients import RecordedCall, autocast_device, cast_for_autocast, is_record, needed_gradients, requires_gradient
from .policy import COMPILED_CHOICES, Policy

NAMESPACE = "vila_triton"
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str"}
is_compiling = torch.compiler.is_compiling


POLICIES: list[Policy] = []  # that compiled code ran under; a process has few


@torch.library.custom_op(f"{NAMESPACE}::current_choices", mutates_args=())
def current_choices(x: Tensor) -> Tensor:
    """The place of the policy that holds now in `POLICIES`, as an int64 tensor; x is there to say when that is."""
    policy = Policy.current()
    known = (i for i, other in enumerate(POLICIES) if policy.is_same_as(other))
    number = next(known, len(POLICIES))
    POLICIES[number:] = POLICIES[number:] or [policy]
    return torch.tensor(number)


current_choices.register_fake(lambda x: torch.empty((), dtype=torch.int64))


class OpLike(Protocol):
    """The attributes of an `Op` that are read here."""

    name: str
    reference: Callable[..., Any]
    precondition: Callable[..., None] | None
    autocasts: bool

    @property
    def keeps_lse(self) -> bool: ...
    def run_implementation(self, *args: Any, **kwargs: Any) -> Any: ...
    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SchemaArgument:
    """One parameter of a reference and its place in the schema."""

    name: str
    default: Any
    schema_types: tuple[str, ...]  # one, or one a field
    dataclass_type: type | None  # that the values are the fields of
    field_names: tuple[str, ...]


def schema_type(hint: Any) -> str:
    """The type of a field in the schema: a Tensor unless it is plain data."""
    literals = get_args(hint)  # of a Literal
    return SCHEMA_TYPES.get(type(literals[0]) if literals else hint, "Tensor")


def schema_argument(op: OpLike, name: str, default: Any, hint: Any) -> SchemaArgument:
    """Return the place of one parameter in the schema; raises TypeError for an annotation that a schema cannot hold."""
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        field_names = tuple(f.name for f in fields(hint))
        return SchemaArgument(name, default, tuple(schema_type(hints[n]) for n in field_names), hint, field_names)
    if Tensor in get_args(hint) and any(map(is_dataclass, get_args(hint))):
        hint = Tensor
    if hint not in SCHEMA_TYPES:
        raise TypeError(
            f"{op.name}: {name} is annotated {hint}, expected a dataclass or one of {', '.join(SCHEMA_TYPES.values())}"
        )
    return SchemaArgument(name, default, (SCHEMA_TYPES[hint],), None, ())


def schema_arguments(op: OpLike) -> tuple[SchemaArgument, ...]:
    """Return the place in the schema of every parameter of the op's reference, in order."""
    hints = get_type_hints(op.reference)
    parameters = inspect.signature(op.reference).parameters.values()
    return tuple(schema_argument(op, p.name, p.default, hints[p.name]) for p in parameters)


def count_new_results(op: OpLike, mutated: Sequence[str]) -> tuple[int, bool]:
    """The number of new tensors that a custom op returns by the reference's annotation, and True if that is a tuple.

    Raises TypeError for a result that no schema can express.
    """
    hint = get_type_hints(op.reference).get("return")
    returns_tuple = get_origin(hint) is tuple
    results = get_args(hint) if returns_tuple else (hint,)
    new_results = results[: len(results) - len(mutated)]
    if hint == Tensor | tuple[Tensor, Tensor] and not mutated:  # with `return_lse`
        return 2, True
    several = returns_tuple and len(results) >= len(mutated)
    if (mutated and not several) or any(x != Tensor for x in new_results):
        after = f", and after them {', '.join(mutated)}"
        expected = f"a tuple of Tensors{after}" if mutated else "a Tensor or a tuple of Tensors"
        raise TypeError(f"{op.name} returns {hint}, expected {expected}, as many as it always returns")
    return len(new_results), returns_tuple


def format_schema(arguments: Sequence[SchemaArgument], mutated: Sequence[str], num_new: int) -> str:
    """The schema as torch writes it: "(Tensor x, Tensor w_qweight, int w_group, Tensor? choices=None) -> (Tensor)"."""
    parameters = []
    for i, a in enumerate(arguments):
        types = [f"Tensor(a{i}!)"] if a.name in mutated else a.schema_types
        parameters += [f"{t} {n}" for t, n in zip(types, flatten_names([a]), strict=True)]
    parameters.append("Tensor? choices=None")
    return f"({', '.join(parameters)}) -> ({', '.join(['Tensor'] * num_new)})"


def flatten_args(arguments: Sequence[SchemaArgument], values: dict[str, Any]) -> list[Any]:
    """Arguments of the op by name -> arguments of its custom op."""
    flat = []
    for a in arguments:
        value = values.get(a.name, a.default)
        flat += [getattr(value, f) for f in a.field_names] if a.field_names else [value]
    return flat


def flatten_names(arguments: Sequence[SchemaArgument]) -> list[str]:
    """The names of a custom op's arguments, as in its schema."""
    return [name for a in arguments for name in ([f"{a.name}_{f}" for f in a.field_names] or [a.name])]


def unflatten_args(arguments: Sequence[SchemaArgument], flat: Sequence[Any]) -> list[Any]:
    """Arguments of the custom op -> arguments of the op, in order."""
    remaining = iter(flat)
    return [
        a.dataclass_type(*(next(remaining) for _ in a.field_names)) if a.dataclass_type else next(remaining)
        for a in arguments
    ]


class CustomOp:
    """A `torch.library` custom op; calling it takes the place of calling its op while that is traced.

    fake_impl: the op's arguments -> its new tensors, empty. mutated: the arguments it writes and returns after these.
    Raises TypeError for a reference whose annotations no schema can express.
    """

    def __init__(self, op: OpLike, fake_impl: Callable[..., Any] | None, mutated: tuple[str, ...] = ()):
        self.op, self.fake_impl, self.mutated = op, fake_impl, mutated
        self.arguments = schema_arguments(op)
        self.names = tuple(a.name for a in self.arguments)
        if unknown := set(mutated) - set(self.names):
            raise TypeError(f"{op.name}.mutates: no argument {', '.join(sorted(unknown))}")
        self.num_new, self.returns_tuple = count_new_results(op, mutated)
        schema = format_schema(self.arguments, mutated, self.num_new)
        custom_op = torch.library.custom_op(f"{NAMESPACE}::{op.name}", self._run, mutates_args=mutated, schema=schema)
        custom_op.register_fake(self._run_fake)
        if not mutated:
            custom_op.register_autograd(once_differentiable(self._backward), setup_context=self._setup_context)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), op.name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = autocast_device(args, kwargs) if self.op.autocasts else ""
        values = self.op.bind(*(cast_for_autocast(args, kwargs, device) if device else (args, kwargs)))
        returns_lse = values.get("return_lse", False)
        choices = None if torch.compiler.is_dynamo_compiling() else COMPILED_CHOICES.get()  # dynamo cannot trace `get`
        if requires_gradient(args, kwargs):
            needs = needed_gradients(self.op, values)
            if returns_lse and self.op.keeps_lse:  # torch runs the call uncompiled then, where that is refused
                raise RuntimeError(f"{self.op.name}: compiled code cannot refuse a gradient of the log-sum-exp")
            values |= {"return_lse": True} if self.op.keeps_lse else {}
            choices = torch.ops.vila_triton.current_choices(values[needs[0]])
        flat = flatten_args(self.arguments, values)
        if any(map(is_record, flat)):
            return self.op.reference(*args, **kwargs)
        out = self.overload(*flat, choices)
        if "return_lse" in values:
            return out if returns_lse else out[0]
        if not self.returns_tuple:
            return out
        new = () if out is None else out if self.num_new > 1 else (out,)
        return (*new, *(values[name] for name in self.mutated))

    def _run(self, *flat_and_choices: Any) -> Any:
        flat, choices = self._split_choices(flat_and_choices)
        with nullcontext() if choices is None else POLICIES[int(choices)].active():
            out = self.op.run_implementation(*unflatten_args(self.arguments, flat))
        return self._new_results(out[: len(out) - len(self.mutated)] if self.mutated else out)

    def _split_choices(self, flat: Sequence[Any]) -> tuple[Sequence[Any], Tensor | None]:
        """The arguments of the op, flat, and the last one of the custom op, which torch leaves out where it is None."""
        num_args = len(flatten_names(self.arguments))
        return flat[:num_args], flat[num_args] if len(flat) > num_args else None

    def _run_fake(self, *flat: Any) -> Any:
        args = unflatten_args(self.arguments, flat)
        if self.op.precondition:
            self.op.precondition(*args)
        return self._new_results(self.fake_impl(*args) if self.fake_impl else ())

    def _setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        values = dict(zip(self.names, unflatten_args(self.arguments, inputs), strict=True))
        outs = output if isinstance(output, tuple) else (output,)
        if self.op.keeps_lse and not values["return_lse"]:
            raise RuntimeError(f"{self.op.name}: the gradient is made of the log-sum-exp, expected return_lse=True")
        flat_names = flatten_names(self.arguments)
        needs = [name for name, needed in zip(flat_names, ctx.needs_input_grad) if needed]
        ctx.call, tensors = RecordedCall.record(self.op, values, needs, outs)
        choices = self._split_choices(inputs)[1]
        ctx.save_for_backward(*tensors, torch.ops.vila_triton.current_choices(outs[0]) if choices is None else choices)
        ctx.mark_non_differentiable(*outs[1:] if self.op.keeps_lse else ())

    def _backward(self, ctx: Any, *grads: Any) -> Any:
        *tensors, choices = ctx.saved_tensors
        token = COMPILED_CHOICES.set(choices)
        try:
            found = ctx.call.gradients(grads, tensors)
        finally:
            COMPILED_CHOICES.reset(token)
        return *(found.get(name) for name in flatten_names(self.arguments)), None

    def _new_results(self, out: Any) -> Any:
        """The new tensors as torch takes them: a tuple only if there are several."""
        tensors = tuple(x.contiguous() for x in (out if isinstance(out, tuple) else (out,)))
        if "return_lse" in self.names and len(tensors) == 1:
            tensors = (*tensors, tensors[0].new_empty(0, dtype=torch.float32))
        if len(tensors) != self.num_new:
            raise TypeError(
                f"{self.op.name} returns {len(tensors)} new tensors, "
                f"expected {self.num_new} by the annotation of its reference"
            )
        return tensors if self.num_new > 1 else tensors[0] if tensors else None
