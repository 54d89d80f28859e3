"""The tables that emitters enter themselves in."""

from collections.abc import Callable
from typing import Any

from ..kinds import Kind, kind_of
from ..ptx import Instruction
from ..writer import Writer

Emitter = Callable[[Writer, Instruction], None]
EMITTERS: dict[str, Emitter] = {}
RUNTIME: dict[str, Any] = {}


def emits(*opcodes: str) -> Callable[[Emitter], Emitter]:
    """Decorates the function that writes the instructions of these opcodes."""

    def enter(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(opcodes, emitter))
        return emitter

    return enter


def called_by_code(function: Callable) -> Callable:
    """Decorates a function that generated code calls by its name."""
    RUNTIME[function.__name__] = function
    return function


def kind_at_end(i: Instruction) -> Kind:
    """The type that an instruction's name ends with."""
    return kind_of(i.modifiers[-1])
