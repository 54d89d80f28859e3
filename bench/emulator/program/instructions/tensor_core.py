"""mma.sync and wgmma. What they compute is in `fragments`."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ..kinds import kind_of
from ..ptx import Instruction, Operand, Register, UnknownPTX, Vector
from ..writer import Writer
from .table import emits

Registers = tuple[str, ...]
ELEMENTS = ("f16", "bf16", "tf32", "s8", "u8", "e4m3", "e5m2")


@dataclass
class Products:
    """Instructions mma.sync of which each has an accumulator of its own: d = a b + c.

    rows, columns  the distinct fragments a and b; at: accumulator d -> numbers of its row and column
    start          accumulator d -> registers c that it starts from, and if all of them are d themselves
    """

    start: dict[Registers, Registers] = field(default_factory=dict)
    rows: list[Registers] = field(default_factory=list)
    columns: list[Registers] = field(default_factory=list)
    at: dict[Registers, tuple[int, int]] = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        return all(d == c for d, c in self.start.items())

    def add(self, d: Registers, a: Registers, b: Registers, c: Registers) -> None:
        for fragment, fragments in ((a, self.rows), (b, self.columns)):
            if fragment not in fragments:
                fragments.append(fragment)
        self.start[d] = c
        self.at[d] = self.rows.index(a), self.columns.index(b)

    def continues(self, other: "Products") -> bool:
        """True if these add to what the other has computed, in the same arrangement."""
        return self.in_place and self.at == other.at


def registers_of(operand: Operand) -> Registers:
    """The names of the registers of a fragment."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    names = []
    for item in items:
        if not isinstance(item, Register) or item.bits != 32:
            raise UnknownPTX(f"{item} in a fragment")
        names.append(item.name)
    return tuple(names)


def begins_run(i: Instruction) -> bool:
    """True for an instruction that `emit_run` writes."""
    return i.opcode == "mma" and i.guard is None


def emit_run(w: Writer, run: list[Instruction]) -> None:
    """Instructions mma.sync of one name that follow each other, as few products as their accumulators allow.

    Each is a call S.mma(i, (rows, columns, steps, present), a, b, c): a holds the registers of `steps` times `rows`
    fragments, b of `steps` times `columns`, and c, like the result, of the accumulators of `present` (row, column).
    """
    check_product(run[0])
    products: list[Products] = []
    written: set[str] = set()  # by the last of them
    for i in run:
        d, a, b, c = (registers_of(x) for x in i.operands)
        if not products or not written.isdisjoint((*d, *a, *b, *c)):
            products.append(Products())
            written = set()
        products[-1].add(d, a, b, c)
        written.update(d)
    at = 0
    while at < len(products):
        steps = 1
        while (
            at + steps < len(products)
            and products[at + steps].continues(products[at])
            and clear(products[at], products[at + steps])
        ):
            steps += 1
        emit_products(w, run[0], products[at : at + steps])
        at += steps


def clear(first: Products, later: Products) -> bool:
    """True if no fragment of the later ones is an accumulator of the first."""
    written = {name for d in first.start for name in d}
    return not any(written & set(fragment) for fragment in later.rows + later.columns)


def emit_products(w: Writer, i: Instruction, steps: list[Products]) -> None:
    """The call for products that follow each other along k."""
    first = steps[0]
    order = list(first.at)

    def fragments(groups: list[list[Registers]]) -> str:
        return "[" + ", ".join("[" + ", ".join(map(fragment, group)) + "]" for group in groups) + "]"

    def fragment(names: Registers) -> str:
        return "[" + ", ".join(w.value(Register(name, 32), "b32") for name in names) + "]"

    a, b = fragments([s.rows for s in steps]), fragments([s.columns for s in steps])
    c = "[" + ", ".join(fragment(first.start[d]) for d in order) + "]"
    plan = w.share((len(first.rows), len(first.columns), len(steps), [first.at[d] for d in order]), "plan")
    results: list[Operand] = [Register(name, 32) for d in order for name in d]
    w.assign_list(results, f"S.mma({i.id}, {plan}, {a}, {b}, {c})")


def check_product(i: Instruction) -> None:
    """An error for a form of mma that is not computed."""
    m = tuple(x for x in i.modifiers if x != "satfinite")
    if m[:2] != ("sync", "aligned") or not re.fullmatch(r"m16n8k(4|8|16|32)", m[2]) or m[3:5] != ("row", "col"):
        raise UnknownPTX("this shape of mma")
    if len(m) != 9 or m[6] not in ELEMENTS or m[7] not in ELEMENTS or m[5] not in ("f32", "f16", "s32"):
        raise UnknownPTX("mma of these types")


@emits("mma")
def emit_product(w: Writer, i: Instruction) -> None:
    """mma that is not part of a run."""
    raise UnknownPTX("mma under a guard")


class WarpGroupProduct(NamedTuple):
    """The form of a wgmma.mma_async. negate: a factor -1; transpose: the other axis of a tile is contiguous."""

    m: int
    n: int
    k: int
    d_kind: str
    a_kind: str
    b_kind: str
    negate_a: bool = False
    negate_b: bool = False
    transpose_a: bool = False
    transpose_b: bool = False


@emits("wgmma")
def emit_warp_group(w: Writer, i: Instruction) -> None:
    """wgmma: its products, commits, waits and fences."""
    if i.guard:
        raise UnknownPTX("wgmma under a guard")
    if i.modifiers[0] == "fence":
        return None
    if i.modifiers[0] == "commit_group":
        w.line(f"S.wgmma_commit({i.id})")
        return w.line("M.accumulators.commit()")
    if i.modifiers[0] == "wait_group":
        w.step.waits = w.integer(i.operands[0])
        w.line(f"S.wgmma_wait({i.id}, {w.step.waits})")
        return w.line(f"M.accumulators.wait({w.step.waits})")
    plan = warp_group_product(w, i)
    d, a, b = i.operands[:3]
    assert isinstance(d, Vector)
    unused = w.integer(i.operands[3]) == 0
    old = ", ".join([w.constant(0, "u4")] * len(d.items) if unused else w.registers(d))
    left = f"[{', '.join(w.registers(a))}]" if isinstance(a, Vector) else w.value(a, "b64")
    scale = w.predicate(i.operands[3])
    w.step.used_where = dict.fromkeys(registers_of(d), scale)  # what they held counts where they are added to
    call = f"S.wgmma({i.id}, {w.share(plan, 'plan')}, [{old}], {left}, {w.value(b, 'b64')}, {scale})"
    w.assign_list(list(d.items), call)
    w.step.accumulators += w.step.writes
    w.step.sources += registers_of(a) if isinstance(a, Vector) else []
    return None


def warp_group_product(w: Writer, i: Instruction) -> WarpGroupProduct:
    """The form of a wgmma.mma_async, from its modifiers and its last operands."""
    shape = re.fullmatch(r"m(64)n(\d+)k(\d+)", i.modifiers[3])
    if i.modifiers[:3] != ("mma_async", "sync", "aligned") or not shape or len(i.modifiers) != 7:
        raise UnknownPTX("this form of wgmma")
    d, a, b = i.modifiers[4:7]
    if d not in ("f32", "f16", "s32") or a not in ELEMENTS or b not in ELEMENTS or kind_of(a).bits != kind_of(b).bits:
        raise UnknownPTX("wgmma of these types")
    numbers = [w.integer(x) for x in i.operands[4:]]
    if None in numbers:
        raise UnknownPTX("this form of wgmma")
    negate = [n == -1 for n in numbers[:2]] if d != "s32" else []
    transpose = [bool(n) for n in numbers[len(negate) :]]
    if isinstance(i.operands[1], Vector):
        transpose = [False, *transpose]
    (negate_a, negate_b), (transpose_a, transpose_b) = ([*x, False, False][:2] for x in (negate, transpose))
    m, n, k = map(int, shape.groups())
    return WarpGroupProduct(m, n, k, d, a, b, negate_a, negate_b, transpose_a, transpose_b)
