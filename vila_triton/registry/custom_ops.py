"""Every op as a `torch.library` custom op, `torch.ops.vila_triton.NAME`: one opaque node to whoever traces a model.

While `torch.compile` traces, a call of an op is a call of its custom op. Of that it learns what `Op.result` and
`Op.writes` declare; which implementation runs is settled when the compiled code runs, as for any call, and a change of
choice compiles nothing anew. (A captured CUDA graph keeps the kernels it was captured with.)

The schema is read off the reference's annotations:

    Tensor, Tensor | None, int, float, bool, str   as they are
    a dataclass, as `Int4` or `PagedKV`            its fields one after the other, NAME_FIELD each
    Tensor | a dataclass, also as a field          a Tensor; a call with the other is traced through the reference

A call with `return_lse`, which returns two tensors, is left uncompiled, between two graphs.

A reference returns a Tensor or a tuple of them, the arguments that it writes last. Results are contiguous. There is no
gradient: torch says so when one is asked for; uncompiled calls of what torch computes have theirs.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .registry import Op

NAMESPACE = "vila_triton"
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str"}
is_compiling = torch.compiler.is_compiling


@dataclass(frozen=True)
class SchemaArgument:
    """One parameter of a reference, and what it is in the schema."""

    name: str
    default: Any
    schema_types: tuple[str, ...]  # of the schema, one or one a field
    dataclass_type: type | None  # the dataclass to which the values are put together
    field_names: tuple[str, ...]


def schema_type(hint: Any) -> str:
    """The type of a field in the schema: what is not plain data is a Tensor."""
    literals = get_args(hint)  # of a Literal
    return SCHEMA_TYPES.get(type(literals[0]) if literals else hint, "Tensor")


def schema_argument(op: "Op", name: str, default: Any, hint: Any) -> SchemaArgument:
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


def schema_arguments(op: "Op") -> tuple[SchemaArgument, ...]:
    hints = get_type_hints(op.reference)
    parameters = inspect.signature(op.reference).parameters.values()
    return tuple(schema_argument(op, p.name, p.default, hints[p.name]) for p in parameters)


def count_new_results(op: "Op", mutated: Sequence[str]) -> tuple[int, bool]:
    """How many new tensors a call returns by the annotation of the reference, and whether in a tuple.

    Errors: TypeError for what no schema holds.
    """
    hint = get_type_hints(op.reference).get("return")
    returns_tuple = get_origin(hint) is tuple
    results = get_args(hint) if returns_tuple else (hint,)
    new_results = results[: len(results) - len(mutated)]
    with_lse = Tensor | tuple[Tensor, Tensor]
    if (
        (mutated and not returns_tuple)
        or len(results) < len(mutated)
        or any(x not in (Tensor, with_lse) for x in new_results)
    ):
        expected = (
            f"a tuple of Tensors, and after them {', '.join(mutated)}" if mutated else "a Tensor or a tuple of Tensors"
        )
        raise TypeError(f"{op.name} returns {hint}, expected {expected}, as many as it always returns")
    return len(new_results), returns_tuple


def format_schema(arguments: Sequence[SchemaArgument], mutated: Sequence[str], num_new: int) -> str:
    """As torch writes it: "(Tensor x, Tensor w_qweight, int w_group, Tensor? bias) -> (Tensor)"."""
    parameters = []
    for i, a in enumerate(arguments):
        types = [f"Tensor(a{i}!)"] if a.name in mutated else a.schema_types
        names = [f"{a.name}_{f}" for f in a.field_names] or [a.name]
        parameters += [f"{t} {n}" for t, n in zip(types, names, strict=True)]
    return f"({', '.join(parameters)}) -> ({', '.join(['Tensor'] * num_new)})"


def flatten_args(arguments: Sequence[SchemaArgument], values: dict[str, Any]) -> list[Any]:
    """Arguments by name -> those of the custom op."""
    flat = []
    for a in arguments:
        value = values.get(a.name, a.default)
        flat += [getattr(value, f) for f in a.field_names] if a.field_names else [value]
    return flat


def unflatten_args(arguments: Sequence[SchemaArgument], flat: Sequence[Any]) -> list[Any]:
    """The inverse: the arguments of the op, in order."""
    remaining = iter(flat)
    return [
        a.dataclass_type(*(next(remaining) for _ in a.field_names)) if a.dataclass_type else next(remaining)
        for a in arguments
    ]


def register_custom_op(
    op: "Op", fake_impl: Callable[..., Any] | None, mutated: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Define the custom op of an op -> a call of it, to take the place of the op's while it is traced.

    result: the op's arguments -> an empty tensor as it returns, or several; writes: the arguments that it writes and
    returns after those.
    """
    arguments = schema_arguments(op)
    if unknown := set(mutated) - {a.name for a in arguments}:
        raise TypeError(f"{op.name}.writes: no argument {', '.join(sorted(unknown))}")

    num_new, returns_tuple = count_new_results(op, mutated)

    def new_results(out: Any) -> Any:
        """New tensors as torch takes them of so many."""
        tensors = tuple(x.contiguous() for x in (out if isinstance(out, tuple) else (out,)))
        if len(tensors) != num_new:
            raise TypeError(
                f"{op.name} returns {len(tensors)} new tensors, expected {num_new} by the annotation of its reference"
            )
        return tensors if num_new > 1 else tensors[0] if tensors else None

    def run(*flat: Any) -> Any:
        out = op.run(*unflatten_args(arguments, flat))
        return new_results(out[: len(out) - len(mutated)] if mutated else out)

    def fake(*flat: Any) -> Any:
        args = unflatten_args(arguments, flat)
        if op.precondition:
            op.precondition(*args)
        return new_results(fake_impl(*args) if fake_impl else ())

    custom = torch.library.custom_op(
        f"{NAMESPACE}::{op.name}", run, mutates_args=mutated, schema=format_schema(arguments, mutated, num_new)
    )
    custom.register_fake(fake)
    overload = getattr(getattr(torch.ops, NAMESPACE), op.name).default
    names = tuple(a.name for a in arguments)

    @torch.compiler.disable
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        return op.run(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        values = dict(zip(names, args), **kwargs)
        if len(args) > len(names) or any(name not in names for name in kwargs):
            raise TypeError(f"{op.name} takes {', '.join(names)}")
        if values.get("return_lse"):
            return uncompiled(*args, **kwargs)
        flat = flatten_args(arguments, values)
        if any(map(is_dataclass, flat)):
            return op.reference(*args, **kwargs)
        out = overload(*flat)
        results = () if out is None else out if num_new > 1 else (out,)
        return (*results, *(values[name] for name in mutated)) if returns_tuple else out

    return call
