"""Floating-point arithmetic. The numbers themselves are those of `bench.emulator.numbers`."""

import numpy as np

from ..kinds import Kind, kind_of
from ..ptx import Instruction, UnknownPTX
from ..writer import Writer
from .table import called_by_code, emits, kind_at_end

MODES = ("rn", "rz", "rm", "rp")
SYMBOLS = {"add": "+", "sub": "-", "mul": "*"}
KNOWN = {  # modifiers besides types and rounding modes -> opcodes that take them
    "ftz": None,
    "sat": ("add", "sub", "mul", "fma"),
    "relu": ("fma", "min", "max"),
    "NaN": ("min", "max"),
    "xorsign": ("min", "max"),
    "abs": ("min", "max"),
    "approx": ("div", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"),
    "full": ("div",),
    "noftz": None,
}


def check_modifiers(i: Instruction) -> str:
    """The rounding mode; an error for a modifier that the opcode does not take."""
    mode = "rn"
    for m in i.modifiers[:-1]:
        if m in MODES:
            mode = m
        elif m not in KNOWN or (KNOWN[m] and i.opcode not in (KNOWN[m] or ())):
            raise UnknownPTX(f".{m}")
    return mode


@emits("fma", "ex2", "lg2", "sin", "cos", "tanh", "rcp", "sqrt", "rsqrt", "copysign")
def emit_floating(w: Writer, i: Instruction) -> None:
    """Arithmetic of one number or of each lane of packed ones: flushed, computed, saturated, flushed."""
    kind, mode = kind_at_end(i), check_modifiers(i)
    values = [w.value(x, kind) for x in i.operands[1:]]
    lane = kind.lane
    if kind.lanes > 1:
        values = [f"{'pairs' if lane.bits == 32 else 'halves'}({x})" for x in values]
    flush = "ftz" in i.modifiers and lane.text == "f32"
    if flush and i.opcode != "copysign":
        values = [f"ftz({x})" for x in values]
    result = expression(i, lane, mode, values)
    if "sat" in i.modifiers:
        result = saturated(result, lane)
    if "relu" in i.modifiers:
        result = f"relu({lane.text!r}, {result})"
    if flush and i.opcode not in ("min", "max", "neg", "abs", "copysign"):
        result = f"ftz({result})"
    if kind.lanes > 1:
        result = f"{'joined_pairs' if lane.bits == 32 else 'joined'}({result})"
    w.assign(i.operands[0], result, kind)


@called_by_code
def pairs(x: np.ndarray) -> np.ndarray:
    """[..., T] of 64 bits -> [..., T, 2] of float32, low one first."""
    return np.ascontiguousarray(x).reshape((*x.shape, 1)).view(np.float32)


@called_by_code
def joined_pairs(x: np.ndarray) -> np.ndarray:
    """[..., T, 2] of float32 -> [..., T] of 64 bits."""
    return np.ascontiguousarray(x).view(np.uint64)[..., 0]


def saturated(result: str, kind: Kind) -> str:
    """Between 0 and 1, NaN as 0."""
    if kind.text in ("f32", "f64"):
        return f"saturate({result})"
    widen, narrow = ("f16_f32", "f32_f16") if kind.text == "f16" else ("bf_f32", "f32_bf")
    return f"{narrow}(saturate({widen}({result})))"


def expression(i: Instruction, kind: Kind, mode: str, x: list[str]) -> str:
    """An expression for the unrounded, unflushed numbers of one lane."""
    name, text = i.opcode, kind.text
    if name in ("min", "max"):
        nan, sign = "NaN" in i.modifiers, "xorsign" in i.modifiers
        first, *rest = x
        for other in rest:
            first = f"{name}imum({text!r}, {first}, {other}, {nan}, {sign})"
        return first
    if name == "neg":
        return f"negative({text!r}, {x[0]})"
    if name == "abs":
        return f"np.abs({x[0]})" if text in ("f32", "f64") else f"({x[0]} & u2(0x7fff))"
    if name == "copysign":
        return f"np.copysign({x[1]}, {x[0]})"
    if text == "f64":
        return double_expression(i, mode, x)
    if name in SYMBOLS:
        if text == "f32" and mode == "rn":
            return f"({x[0]} {SYMBOLS[name]} {x[1]})"
        if name == "sub":
            x = [x[0], f"negative({text!r}, {x[1]})"]
        return f"{'mul' if name == 'mul' else 'add'}({text!r}, {x[0]}, {x[1]}, {mode!r})"
    if name == "fma":
        return f"fma32({', '.join(x)})" if (text, mode) == ("f32", "rn") else f"fma({text!r}, {', '.join(x)}, {mode!r})"
    if "approx" in i.modifiers and name != "div":
        return f"approx({name!r}, {text!r}, {x[0]})"
    if text != "f32":
        raise UnknownPTX(f"{name} of {text}")
    if name == "div":
        approximate = "approx" in i.modifiers
        return f"divide_approx({x[0]}, {x[1]})" if approximate else f"divide({x[0]}, {x[1]}, {mode!r})"
    if name in ("rcp", "sqrt"):
        return f"{'reciprocal' if name == 'rcp' else 'square_root'}({x[0]}, {mode!r})"
    raise UnknownPTX(name)


DOUBLE = {"add": "add", "sub": "add", "mul": "mul", "fma": "fma", "div": "divide", "sqrt": "square_root"}


def double_expression(i: Instruction, mode: str, x: list[str]) -> str:
    """The same of float64."""
    if i.opcode == "rcp":
        return f"numbers64.divide(np.ones((1, 1)), {x[0]}, {mode!r})"
    if i.opcode == "rsqrt":
        return f"(1 / np.sqrt({x[0]}))"
    if i.opcode not in DOUBLE:
        raise UnknownPTX(f"{i.opcode} of f64")
    x = [x[0], f"-{x[1]}"] if i.opcode == "sub" else x
    return f"numbers64.{DOUBLE[i.opcode]}({', '.join(x)}, {mode!r})"


@emits("testp")
def emit_class_test(w: Writer, i: Instruction) -> None:
    """testp: to which class a number belongs."""
    kind = kind_of(i.modifiers[-1])
    x, test = w.value(i.operands[1], kind), i.modifiers[0]
    tiny = w.constant(0x00800000 if kind.text == "f32" else 0x0010000000000000, kind.dtype)
    tests = {
        "finite": f"np.isfinite({x})",
        "infinite": f"np.isinf({x})",
        "number": f"~np.isnan({x})",
        "notanumber": f"np.isnan({x})",
        "normal": f"(np.isfinite({x}) & ((np.abs({x}) >= {tiny}) | ({x} == 0)))",
        "subnormal": f"((np.abs({x}) < {tiny}) & ({x} != 0))",
    }
    w.assign(i.operands[0], tests[test], "pred")
