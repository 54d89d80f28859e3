"""The waits for wgmma that come before a use of what it writes, computed from the text of a kernel.

A wgmma runs on until it is waited for. Until then nothing but another wgmma may touch its accumulators, and nothing may
write the registers that hold its left operand, if registers do.
"""

from collections.abc import Collection

from ..emulator.program.ptx import Instruction, Kernel, Vector
from .edits import registers, written

MOST_GROUPS = 4  # under way at once that are told apart; older ones count as one
Registers = frozenset[tuple[str, str]]  # ("accumulator" or "source", name)
UnderWay = tuple[Registers, ...]  # the groups, the last of them not committed yet


def find_product_waits(kernel: Kernel, entered: Collection[int]) -> set[int]:
    """Returns the ids of the waits without which an instruction could touch registers of a wgmma under way. Only the
    basic blocks that were entered count. Errors: ValueError if one does so with all waits in place.
    """
    if meets_products(kernel, entered, without=None):
        raise ValueError(f"{kernel.name} uses registers of a wgmma before it waits for it")
    waits = [x for index in entered for x in kernel.blocks[index].instructions if x.name.startswith("wgmma.wait_group")]
    return {wait.id for wait in waits if meets_products(kernel, entered, wait.id)}


def meets_products(kernel: Kernel, entered: Collection[int], without: int | None) -> bool:
    """True if on some way through the blocks, but for one wait, registers of a wgmma under way are touched."""
    visited: set[tuple[int, UnderWay]] = {(0, (frozenset(),))}
    ways = list(visited)
    while ways:
        index, under_way = ways.pop()
        for x in kernel.blocks[index].instructions:
            if x.id == without:
                continue
            if touches(x, frozenset[tuple[str, str]]().union(*under_way)):
                return True
            under_way = products_after(x, under_way)
        following = {(successor, under_way) for successor in kernel.blocks[index].successors() if successor in entered}
        ways += following - visited
        visited |= following
    return False


def touches(x: Instruction, busy: Registers) -> bool:
    """True if an instruction must not run while these registers are in use."""
    if not busy or x.opcode == "wgmma":
        return False
    touched = {("accumulator", name) for name in registers(*x.operands, x.guard)}
    return bool(busy & (touched | {("source", name) for name in written(x)}))


def products_after(x: Instruction, under_way: UnderWay) -> UnderWay:
    """The products under way after an instruction."""
    if x.name.startswith("wgmma.mma_async"):
        sources = {
            ("source", name)
            for operand in x.operands[1:2]
            if isinstance(operand, Vector)
            for name in registers(operand)
        }
        return (*under_way[:-1], under_way[-1] | {("accumulator", name) for name in written(x)} | sources)
    if x.name.startswith("wgmma.commit_group"):
        oldest, latest = under_way[:-MOST_GROUPS], under_way[-MOST_GROUPS:]
        return (*((frozenset[tuple[str, str]]().union(*oldest),) if oldest else ()), *latest, frozenset())
    if x.name.startswith("wgmma.wait_group"):
        pending = int(x.text.rstrip("; ").split()[-1])
        return (*under_way[len(under_way) - 1 - pending : -1], under_way[-1]) if pending else under_way[-1:]
    return under_way
