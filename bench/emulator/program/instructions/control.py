"""Branches, barriers, and instructions that change nothing that is computed."""

from ..ptx import Immediate, Instruction, UnknownPTX
from ..writer import Writer
from .table import emits


@emits("bra", "ret", "exit")
def emit_branch(w: Writer, i: Instruction) -> None:
    """The end of a block, whose condition the block returns."""


@emits("bar", "barrier")
def emit_barrier(w: Writer, i: Instruction) -> None:
    """Barriers of all threads of a block, and of a warp. Others are for some of the warps, which would have to run on
    their own.
    """
    if i.guard:
        raise UnknownPTX("a barrier under a guard")
    if "warp" in i.modifiers:
        return w.line(f"S.warp_barrier({i.id}, {w.value(i.operands[0], 'b32')})")
    rest = [m for m in i.modifiers if m not in ("sync", "cta", "aligned")]
    number = w.integer(i.operands[0])
    threads = w.integer(i.operands[1]) if len(i.operands) > 1 else w.kernel.threads
    if rest or "sync" not in i.modifiers or number is None or threads != w.kernel.threads:
        raise UnknownPTX("barriers of some of the warps")
    w.line(f"S.barrier({i.id})")


@emits("nanosleep", "pmevent")
def emit_nothing(w: Writer, i: Instruction) -> None:
    """Time does not pass."""


@emits("griddepcontrol")
def emit_dependent_launch(w: Writer, i: Instruction) -> None:
    """Launches run one after the other."""


@emits("setmaxnreg")
def emit_register_count(w: Writer, i: Instruction) -> None:
    """setmaxnreg: there are always enough registers."""
    if not isinstance(i.operands[0], Immediate):
        raise UnknownPTX("this setmaxnreg")
