"""Every op as a `torch.library` custom op, `torch.ops.vila_triton.NAME`: one opaque node to whoever traces a model.

While `torch.compile` traces, a call of an op is a call of its custom op. Of that it learns what `Op.result` and
`Op.writes` declare; which implementation runs is settled when the compiled code runs, as for any call, and a change of
choice compiles nothing anew. (A captured CUDA graph keeps the kernels it was captured with.)

The schema is read off the reference's annotations:

    Tensor, Tensor | None, int, float, bool, str   as they are
    a dataclass, as `Int4`                         its fields one after the other, NAME_FIELD each
    Tensor | a dataclass                           a Tensor; a call with the other is traced through the reference

A call with `lse`, which returns two tensors, is left uncompiled, between two graphs.

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
TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str"}
tracing = torch.compiler.is_compiling


@dataclass(frozen=True)
class Argument:
    """One parameter of a reference, and what it is in the schema."""

    name: str
    default: Any
    types: tuple[str, ...]  # of the schema, one or one a field
    made_of: type | None  # the dataclass to which the values are put together
    fields: tuple[str, ...]


def field_type(hint: Any) -> str:
    """The type of a field in the schema: what is not plain data is a Tensor."""
    choices = get_args(hint)  # of a Literal
    return TYPES.get(type(choices[0]) if choices else hint, "Tensor")


def argument(op: "Op", name: str, default: Any, hint: Any) -> Argument:
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        names = tuple(f.name for f in fields(hint))
        return Argument(name, default, tuple(field_type(hints[n]) for n in names), hint, names)
    if Tensor in get_args(hint) and any(map(is_dataclass, get_args(hint))):
        hint = Tensor
    if hint not in TYPES:
        raise TypeError(
            f"{op.name}: {name} is annotated {hint}, expected a dataclass or one of {', '.join(TYPES.values())}"
        )
    return Argument(name, default, (TYPES[hint],), None, ())


def arguments(op: "Op") -> tuple[Argument, ...]:
    hints = get_type_hints(op.reference)
    parameters = inspect.signature(op.reference).parameters.values()
    return tuple(argument(op, p.name, p.default, hints[p.name]) for p in parameters)


def fresh_results(op: "Op", writes: Sequence[str]) -> tuple[int, bool]:
    """How many new tensors a call returns by the annotation of the reference, and whether in a tuple.

    Errors: TypeError for what no schema holds.
    """
    hint = get_type_hints(op.reference).get("return")
    several = get_origin(hint) is tuple
    results = get_args(hint) if several else (hint,)
    fresh = results[: len(results) - len(writes)]
    with_lse = Tensor | tuple[Tensor, Tensor]
    if (writes and not several) or len(results) < len(writes) or any(x not in (Tensor, with_lse) for x in fresh):
        wanted = (
            f"a tuple of Tensors, and after them {', '.join(writes)}" if writes else "a Tensor or a tuple of Tensors"
        )
        raise TypeError(f"{op.name} returns {hint}, expected {wanted}, as many as it always returns")
    return len(fresh), several


def schema(takes: Sequence[Argument], writes: Sequence[str], fresh: int) -> str:
    """As torch writes it: "(Tensor x, Tensor w_qweight, int w_group, Tensor? bias) -> (Tensor)"."""
    words = []
    for i, a in enumerate(takes):
        types = [f"Tensor(a{i}!)"] if a.name in writes else a.types
        names = [f"{a.name}_{f}" for f in a.fields] or [a.name]
        words += [f"{t} {n}" for t, n in zip(types, names, strict=True)]
    return f"({', '.join(words)}) -> ({', '.join(['Tensor'] * fresh)})"


def flattened(takes: Sequence[Argument], values: dict[str, Any]) -> list[Any]:
    """Arguments by name -> those of the custom op."""
    flat = []
    for a in takes:
        value = values.get(a.name, a.default)
        flat += [getattr(value, f) for f in a.fields] if a.fields else [value]
    return flat


def joined(takes: Sequence[Argument], flat: Sequence[Any]) -> list[Any]:
    """The inverse: the arguments of the op, in order."""
    left = iter(flat)
    return [a.made_of(*(next(left) for _ in a.fields)) if a.made_of else next(left) for a in takes]


def expose(op: "Op", result: Callable[..., Any] | None, writes: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Define the custom op of an op -> a call of it, to take the place of the op's while it is traced.

    result: the op's arguments -> an empty tensor as it returns, or several; writes: the arguments that it writes and
    returns after those.
    """
    takes = arguments(op)
    if unknown := set(writes) - {a.name for a in takes}:
        raise TypeError(f"{op.name}.writes: no argument {', '.join(sorted(unknown))}")

    fresh, several = fresh_results(op, writes)

    def returned(out: Any) -> Any:
        """New tensors as torch takes them of so many."""
        new = tuple(x.contiguous() for x in (out if isinstance(out, tuple) else (out,)))
        if len(new) != fresh:
            raise TypeError(
                f"{op.name} returns {len(new)} new tensors, expected {fresh} by the annotation of its reference"
            )
        return new if fresh > 1 else new[0] if new else None

    def run(*flat: Any) -> Any:
        out = op.run(*joined(takes, flat))
        return returned(out[: len(out) - len(writes)] if writes else out)

    def fake(*flat: Any) -> Any:
        args = joined(takes, flat)
        if op.contract:
            op.contract(*args)
        return returned(result(*args) if result else ())

    custom = torch.library.custom_op(
        f"{NAMESPACE}::{op.name}", run, mutates_args=writes, schema=schema(takes, writes, fresh)
    )
    custom.register_fake(fake)
    overload = getattr(getattr(torch.ops, NAMESPACE), op.name).default
    names = tuple(a.name for a in takes)

    @torch.compiler.disable
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        return op.run(*args, **kwargs)

    def traced(*args: Any, **kwargs: Any) -> Any:
        values = dict(zip(names, args), **kwargs)
        if len(args) > len(names) or any(name not in names for name in kwargs):
            raise TypeError(f"{op.name} takes {', '.join(names)}")
        unions = (values[a.name] for a in takes if a.name in values and not a.fields)
        if values.get("lse"):
            return uncompiled(*args, **kwargs)
        if any(map(is_dataclass, unions)):
            return op.reference(*args, **kwargs)
        out = overload(*flattened(takes, values))
        new = () if out is None else out if fresh > 1 else (out,)
        return (*new, *(values[name] for name in writes)) if several else out

    return traced
