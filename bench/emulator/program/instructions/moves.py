"""Comparisons, choices and moves."""

from ..kinds import UNSIGNED, Kind, kind_of
from ..ptx import Immediate, Instruction, Operand, Register, UnknownPTX, Vector
from ..writer import Writer
from .table import emits, kind_at_end

COMBINATIONS = {"and": "&", "or": "|", "xor": "^"}
COMPARISONS = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
}
UNORDERED = {"equ": "~({0} < {1}) & ~({0} > {1})", "neu": "{0} != {1}", "ltu": "~({0} >= {1})", "leu": "~({0} > {1})",
             "gtu": "~({0} <= {1})", "geu": "~({0} < {1})"}  # fmt: skip


@emits("setp", "set")
def emit_comparison(w: Writer, i: Instruction) -> None:
    """setp, with one or two results and another predicate to combine with, and set."""
    kind = kind_at_end(i)
    if kind.lanes > 1:
        raise UnknownPTX("comparisons of packed numbers")
    comparison = i.modifiers[0]
    a, b = (compared(w, x, kind, "ftz" in i.modifiers) for x in i.operands[1:3])
    result = comparison_of(comparison, a, b, kind)
    combine = i.modifiers[1] if i.modifiers[1] in COMBINATIONS else None
    negative = f"~({result})"
    if combine:
        p = w.predicate(i.operands[3])
        result, negative = (f"({x}) {COMBINATIONS[combine]} {p}" for x in (result, negative))
    if i.opcode == "set":
        to = kind_of(i.modifiers[-2])
        one = w.constant(0x3F800000 if to.is_float else 0xFFFFFFFF, to.dtype)
        return w.assign(i.operands[0], f"np.where({result}, {one}, {w.constant(0, to.dtype)})", to)
    both = i.operands[0]
    if isinstance(both, Vector):
        w.line(f"compared_, inverse_ = {result}, {negative}")
        w.assign(both.items[0], "compared_", "pred")
        return w.assign(both.items[1], "inverse_", "pred")
    w.assign(both, result, "pred")


def compared(w: Writer, operand: Operand, kind: Kind, flush: bool) -> str:
    """An operand as what numpy compares."""
    value = w.value(operand, kind)
    if kind.text == "bf16":
        return f"bf_f32({value})"
    if kind.text == "f16":
        return f"{value}.view(f2)"
    return f"ftz({value})" if flush and kind.text == "f32" else value


def comparison_of(name: str, a: str, b: str, kind: Kind) -> str:
    """A boolean expression: NaN makes the ordered comparisons false and the unordered ones true."""
    if name == "ne" and kind.is_float:
        return f"({a} < {b}) | ({a} > {b})"
    if name in COMPARISONS:
        return f"({a} {COMPARISONS[name]} {b})"
    if name in UNORDERED and kind.is_float:
        return f"({UNORDERED[name].format(a, b)})"
    if name in ("nan", "num"):
        return f"{'' if name == 'nan' else '~'}(({a} != {a}) | ({b} != {b}))"
    raise UnknownPTX(f"comparison {name}")


@emits("selp")
def emit_choice(w: Writer, i: Instruction) -> None:
    """selp: one of two operands by a predicate."""
    kind = kind_of(f"b{kind_at_end(i).bits}")
    p = w.predicate(i.operands[3])
    yes, no = (x.name if isinstance(x, Register) else "" for x in i.operands[1:3])
    w.step.choice = p, yes, no
    w.assign(i.operands[0], f"np.where({p}, {w.value(i.operands[1], kind)}, {w.value(i.operands[2], kind)})", kind)


@emits("slct")
def emit_choice_by_sign(w: Writer, i: Instruction) -> None:
    """slct: one of two operands by the sign of a third."""
    kind, by = kind_of(f"b{kind_of(i.modifiers[-2]).bits}"), kind_at_end(i)
    c = w.value(i.operands[3], by)
    w.assign(i.operands[0], f"np.where({c} >= 0, {w.value(i.operands[1], kind)}, {w.value(i.operands[2], kind)})", kind)


@emits("mov")
def emit_move(w: Writer, i: Instruction) -> None:
    """mov, which packs and unpacks too. A copy of a register is noted as one."""
    kind, (to, source) = kind_at_end(i), i.operands
    if kind.letter == "pred":
        return w.assign(to, w.predicate(source), kind)
    if isinstance(source, Vector):
        return emit_pack(w, to, source, kind)
    if isinstance(to, Vector):
        return emit_unpack(w, to, source, kind)
    if isinstance(source, Register) and isinstance(to, Register) and source.bits == to.bits == kind.bits:
        kind = Kind(f"b{kind.bits}", "b", kind.bits)
        held = w.held.get(source.name, kind.unsigned)
        w.step.copies[to.name] = source.name
        if not w.step.guard and held != kind.unsigned:  # keep the type that the source has
            w.step.reads.append(source.name)
            w.line(f"{to.name} = {source.name}")
            w.held[to.name] = held
            w.step.writes.append(to.name)
            return
    plain = kind if kind.letter == "f" and isinstance(source, Immediate) else kind_of(f"b{kind.bits}")
    w.assign(to, w.value(source, plain), plain)


def emit_pack(w: Writer, to: Operand, source: Vector, kind: Kind) -> None:
    """`mov.b32 d, {a, b}`: the first lies lowest."""
    size = kind.bits // len(source.items)
    terms = []
    for n, item in enumerate(source.items):
        part = f"{w.value(item, f'b{size}')}.astype({kind.unsigned})"
        terms.append(f"({part} << {w.constant(n * size, kind.unsigned)})" if n else part)
    w.assign(to, " | ".join(terms), f"b{kind.bits}")


def emit_unpack(w: Writer, to: Vector, source: Operand, kind: Kind) -> None:
    """`mov.b32 {a, b}, d`"""
    size = kind.bits // len(to.items)
    w.line(f"whole_ = {w.value(source, f'b{kind.bits}')}")
    for n, item in enumerate(to.items):
        shifted = f"(whole_ >> {w.constant(n * size, kind.unsigned)})" if n else "whole_"
        w.assign(item, f"{shifted}.astype({UNSIGNED[size]})", f"b{size}")


@emits("cvta")
def emit_address_conversion(w: Writer, i: Instruction) -> None:
    """Global addresses are generic ones, and those of local memory stay as they are."""
    space = next((m for m in i.modifiers if m in ("global", "local", "shared", "const", "param")), "")
    if space not in ("global", "local"):
        raise UnknownPTX(f"generic addresses of {space or 'an unknown'} memory")
    w.assign(i.operands[0], w.value(i.operands[1], "u64"), "u64")
