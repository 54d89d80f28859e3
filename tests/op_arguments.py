"""The arguments of ops by name: those in a PagedKV or a RaggedBatch by the names of their fields."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from vila_triton.ops import PagedKV, RaggedBatch
from vila_triton.registry import Op

GROUPS = {"cache": PagedKV, "batch": RaggedBatch}


def flat_arguments(op: Op, args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments of a call of the op, by name."""
    values: dict[str, Any] = {}
    for name, value in zip(inspect.signature(op.reference).parameters, args):
        members = fields(GROUPS[name]) if name in GROUPS else ()
        values |= {member.name: getattr(value, member.name) for member in members} or {name: value}
    return values


def grouped_arguments(op: Op, values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: the keyword arguments of a call."""
    names = {name: [f.name for f in fields(GROUPS[name])] if name in GROUPS else [name] for name in parameters(op)}
    present = {name: members for name, members in names.items() if members[0] in values}
    return {
        name: GROUPS[name](*(values[member] for member in members)) if name in GROUPS else values[name]
        for name, members in present.items()
    }


def parameters(op: Op) -> list[str]:
    return list(inspect.signature(op.reference).parameters)
