"""Every op as a `torch.library` custom op, `torch.ops.vila_triton.NAME`, which torch traces as one opaque node.

While `torch.compile` traces, a call of an op becomes a call of its custom op, and `Op.fake_impl` and `Op.mutates` tell
torch its results. The implementation is chosen when the compiled code runs, as for any call, so another choice compiles
nothing anew. A captured CUDA graph keeps the kernels it was captured with.

The schema is read off the annotations of the reference:

    Tensor, Tensor | None, int, float, bool, str   the same type
    a dataclass, as `Int4` or `PagedKV`            its fields one after the other, each named NAME_FIELD
    Tensor | a dataclass, also as a field          a Tensor; a call with the dataclass is traced through the reference

A reference returns a Tensor or a tuple of Tensors, the arguments it writes in place last. A call with `return_lse`
returns one tensor more than the schema says, so it runs uncompiled between two graphs. Results are contiguous. A custom
op has no gradient and torch says so when one is asked for; references that run uncompiled have theirs.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

NAMESPACE = "vila_triton"
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str"}
is_compiling = torch.compiler.is_compiling


class OpLike(Protocol):
    """The attributes of an `Op` that are read here."""

    name: str
    reference: Callable[..., Any]
    precondition: Callable[..., None] | None

    def run(self, *args: Any, **kwargs: Any) -> Any: ...


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
    """The number of new tensors that a call returns by the reference's annotation, and True if it returns a tuple.

    Raises TypeError for a result that no schema can express.
    """
    hint = get_type_hints(op.reference).get("return")
    returns_tuple = get_origin(hint) is tuple
    results = get_args(hint) if returns_tuple else (hint,)
    new_results = results[: len(results) - len(mutated)]
    with_lse = Tensor | tuple[Tensor, Tensor]
    several = returns_tuple and len(results) >= len(mutated)
    if (mutated and not several) or any(x not in (Tensor, with_lse) for x in new_results):
        after = f", and after them {', '.join(mutated)}"
        expected = f"a tuple of Tensors{after}" if mutated else "a Tensor or a tuple of Tensors"
        raise TypeError(f"{op.name} returns {hint}, expected {expected}, as many as it always returns")
    return len(new_results), returns_tuple


def format_schema(arguments: Sequence[SchemaArgument], mutated: Sequence[str], num_new: int) -> str:
    """The schema as torch writes it: "(Tensor x, Tensor w_qweight, int w_group, Tensor? bias) -> (Tensor)"."""
    parameters = []
    for i, a in enumerate(arguments):
        types = [f"Tensor(a{i}!)"] if a.name in mutated else a.schema_types
        names = [f"{a.name}_{f}" for f in a.field_names] or [a.name]
        parameters += [f"{t} {n}" for t, n in zip(types, names, strict=True)]
    return f"({', '.join(parameters)}) -> ({', '.join(['Tensor'] * num_new)})"


def flatten_args(arguments: Sequence[SchemaArgument], values: dict[str, Any]) -> list[Any]:
    """Arguments of the op by name -> arguments of its custom op."""
    flat = []
    for a in arguments:
        value = values.get(a.name, a.default)
        flat += [getattr(value, f) for f in a.field_names] if a.field_names else [value]
    return flat


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
        self.overload = getattr(getattr(torch.ops, NAMESPACE), op.name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self.names, args), **kwargs)
        if len(args) > len(self.names) or any(name not in self.names for name in kwargs):
            raise TypeError(f"{self.op.name} takes {', '.join(self.names)}")
        if values.get("return_lse"):
            return self._run_uncompiled(*args, **kwargs)
        flat = flatten_args(self.arguments, values)
        if any(map(is_dataclass, flat)):
            return self.op.reference(*args, **kwargs)
        out = self.overload(*flat)
        if not self.returns_tuple:
            return out
        new = () if out is None else out if self.num_new > 1 else (out,)
        return (*new, *(values[name] for name in self.mutated))

    @_disable_dynamo  # torch.compiler.disable, without the second and a half that importing the compiler takes
    def _run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        return self.op.run(*args, **kwargs)

    def _run(self, *flat: Any) -> Any:
        out = self.op.run(*unflatten_args(self.arguments, flat))
        return self._new_results(out[: len(out) - len(self.mutated)] if self.mutated else out)

    def _run_fake(self, *flat: Any) -> Any:
        args = unflatten_args(self.arguments, flat)
        if self.op.precondition:
            self.op.precondition(*args)
        return self._new_results(self.fake_impl(*args) if self.fake_impl else ())

    def _new_results(self, out: Any) -> Any:
        """The new tensors as torch takes them: a tuple only if there are several."""
        tensors = tuple(x.contiguous() for x in (out if isinstance(out, tuple) else (out,)))
        if len(tensors) != self.num_new:
            raise TypeError(
                f"{self.op.name} returns {len(tensors)} new tensors, "
                f"expected {self.num_new} by the annotation of its reference"
            )
        return tensors if self.num_new > 1 else tensors[0] if tensors else None
