"""cvt. What numpy lacks is in `bench.emulator.conversions`."""

from ...arithmetic.conversions import conversion
from ..kinds import Kind, is_kind, kind_of
from ..ptx import Instruction, UnknownPTX
from ..writer import Writer
from .table import emits

FREQUENT = {
    ("f32", "f16"): "f16_f32",
    ("f32", "bf16"): "bf_f32",
    ("f16", "f32"): "f32_f16",
    ("bf16", "f32"): "f32_bf",
}


@emits("cvt")
def emit_conversion(w: Writer, i: Instruction) -> None:
    """cvt, of one number to one, of two to a pair, or of a pair to a pair."""
    kinds = [m for m in i.modifiers if is_kind(m)]
    modifiers = [m for m in i.modifiers if not is_kind(m)]
    if len(kinds) != 2 or len(i.operands) != (3 if kinds[0].endswith("x2") and not kinds[1].endswith("x2") else 2):
        raise UnknownPTX("this form of cvt")
    to, source = map(kind_of, kinds)
    values = [w.value(x, source) for x in i.operands[1:]]
    w.assign(i.operands[0], converted(w, values, to, source, modifiers), to)


def converted(w: Writer, values: list[str], to: Kind, source: Kind, modifiers: list[str]) -> str:
    """An expression for the conversion: the frequent ones written out, the others by a function."""
    if not modifiers and not to.is_float and not source.is_float:
        return f"{values[0]}.astype({to.dtype})"
    if not set(modifiers) - {"rn"}:
        exact = {("f32", "f64"), ("f64", "f32"), ("f32", "s32"), ("f32", "u32"), ("f64", "s32"), ("f64", "u32")}
        small = source.letter in "us" and source.bits < 32
        if (to.text, source.text) in exact or (to.text in ("f32", "f64") and small):
            return f"{values[0]}.astype({to.dtype})"
        if call := FREQUENT.get((to.text, source.text)):
            return f"{call}({values[0]})"
        if (to.text, source.text) == ("bf16x2", "f32"):
            return f"f32_bf_pair({values[0]}, {values[1]})"
        if call := FREQUENT.get((to.text.removesuffix("x2"), source.text)):
            high, low = (f"{call}({x}).astype(u4)" for x in values)
            return f"({high} << {w.constant(16, 'u4')}) | {low}"
    try:
        function = conversion(to.text, source.text, modifiers)
    except (NotImplementedError, KeyError) as error:
        raise UnknownPTX(str(error)) from None
    return f"{w.share(function, 'convert')}({', '.join(values)})"
