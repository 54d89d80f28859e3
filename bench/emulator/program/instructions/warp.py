"""The threads of a warp together: shuffles, votes, matches, reductions."""

import numpy as np

from ..ptx import Instruction, Operand, Sink, UnknownPTX, Vector
from ..writer import Writer
from .table import RUNTIME, called_by_code, emits, kind_at_end

u4, u8 = np.uint32, np.uint64
LANES = RUNTIME["LANES"] = np.arange(32, dtype=np.int64)


def members(w: Writer, operand: Operand) -> str:
    """The mask of the lanes that take part, or "None" for all."""
    constant = w.integer(operand)
    return "None" if constant is not None and constant & 0xFFFFFFFF == 0xFFFFFFFF else w.value(operand, "b32")


@emits("shfl")
def emit_shuffle(w: Writer, i: Instruction) -> None:
    """shfl.sync in its four modes, with or without the predicate for lanes that read inside of their segment."""
    if i.modifiers[0] != "sync" or i.modifiers[-1] != "b32":
        raise UnknownPTX("this shuffle")
    mode = i.modifiers[1]
    to, source, b, c = i.operands[:4]
    value, mask = w.value(source, "b32"), members(w, i.operands[4])
    both = isinstance(to, Vector)
    lane, clamp = w.integer(b), w.integer(c)
    if lane is not None and clamp is not None:
        origin, inside = source_lanes(mode, LANES, lane, clamp)
        sources = w.share((origin, inside), "lanes")
    else:
        sources = f"source_lanes({mode!r}, LANES, M.by_warp({w.value(b, 'u32')}), M.by_warp({w.value(c, 'u32')}))"
    w.line(f"shuffled_, inside_ = shuffle(M, {i.id}, {value}, *{sources}, {w.guard}, {mask})")
    w.step.spread = f"shuffle(M, None, {{}}, *{sources}, None, None)[0]"
    w.assign(to.items[0] if both else to, "shuffled_", "b32")
    if both:
        w.assign(to.items[1], "inside_", "pred")


@called_by_code
def source_lanes(
    mode: str, lane: np.ndarray, b: np.ndarray | int, c: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane reads, its own where that lies outside of its segment; and where it lies inside."""
    offset, clamp, segment = b & 31, c & 31, (c >> 8) & 31
    last = (lane & segment) | (clamp & ~segment & 31)
    if mode == "up":
        origin = lane - offset
        inside = origin >= last
    else:
        first = lane & segment
        origin = {"down": lane + offset, "bfly": lane ^ offset, "idx": first | (offset & ~segment & 31)}[mode]
        inside = origin <= last
    return np.where(inside, origin, lane), inside


@called_by_code
def shuffle(m, i: int | None, x: np.ndarray, origin: np.ndarray, inside: np.ndarray, mask, member_mask) -> tuple:
    """x of the lanes `origin` ([32] or [blocks, warps, 32]), and `inside` by thread; without i nothing is checked."""
    if m.counters and i is not None:
        m.counts[i, "shuffles"] += m.count_warps(mask)
    present = m.present(i, mask, member_mask) if i is not None else None
    shape = (m.blocks, m.threads)
    if origin.ndim == 1:
        inside = np.tile(inside, m.warps)[None, : m.threads]
    else:
        inside = np.ascontiguousarray(np.broadcast_to(inside, (m.blocks, m.warps, 32))).reshape(m.blocks, -1)
    if i is not None and present is not None:
        m.check_lanes(i, present, origin)
    if x.shape[1] == 1:
        return x, inside
    if origin.ndim == 1:
        by_warp = x.reshape(len(x), -1, 32)
        return by_warp.take(origin, 2).reshape(x.shape), inside
    by_warp = np.broadcast_to(x, shape).reshape(m.blocks, m.warps, 32)
    return np.take_along_axis(by_warp, np.broadcast_to(origin, by_warp.shape), 2).reshape(shape), inside


@emits("vote")
def emit_vote(w: Writer, i: Instruction) -> None:
    """vote.sync."""
    if i.modifiers[0] != "sync":
        raise UnknownPTX("this vote")
    mode = i.modifiers[1]
    p, mask = w.predicate(i.operands[1]), members(w, i.operands[2])
    kind = "b32" if mode == "ballot" else "pred"
    w.assign(i.operands[0], f"vote(M, {i.id}, {mode!r}, {p}, {w.guard}, {mask})", kind)


@called_by_code
def vote(m, i: int, mode: str, p: np.ndarray, mask, member_mask) -> np.ndarray:
    """all, any, uni (all alike) or the ballot of a predicate, over the lanes that are present."""
    present = m.lanes_present(i, mask, member_mask)
    p = m.by_warp(p)
    if mode == "ballot":
        bits = ((p & present) << LANES).sum(2, keepdims=True).astype(u4)
        return m.by_thread(bits)
    yes, no = (p & present).any(2, keepdims=True), (~p & present).any(2, keepdims=True)
    return m.by_thread({"all": ~no, "any": yes, "uni": ~(yes & no)}[mode])


@emits("match")
def emit_match(w: Writer, i: Instruction) -> None:
    """match.sync, any or all."""
    kind = kind_at_end(i)
    if i.modifiers[1] != "sync":
        raise UnknownPTX("this match")
    x, mask = w.value(i.operands[1], kind), members(w, i.operands[2])
    to = i.operands[0]
    w.line(f"matched_, alike_ = match(M, {i.id}, {i.modifiers[0] == 'all'}, {x}, {w.guard}, {mask})")
    w.assign(to.items[0] if isinstance(to, Vector) else to, "matched_", "b32")
    if isinstance(to, Vector):
        w.assign(to.items[1], "alike_", "pred")


@called_by_code
def match(m, i: int, every: bool, x: np.ndarray, mask, member_mask) -> tuple[np.ndarray, np.ndarray]:
    """The lanes that hold the same value; or all of them if every lane does, else none, and if so."""
    present = m.lanes_present(i, mask, member_mask)
    x = m.by_warp(x)
    same = (x[..., :, None] == x[..., None, :]) & present[..., None, :]
    lanes = (same << LANES).sum(3).astype(u4)
    if not every:
        return m.by_thread(lanes), np.ones((1, 1), bool)
    whole = (present << LANES).sum(2, keepdims=True).astype(u4)
    alike = ((lanes == whole) | ~present).all(2, keepdims=True)
    return m.by_thread(np.where(alike, whole, u4(0))), m.by_thread(alike)


@emits("redux")
def emit_reduction(w: Writer, i: Instruction) -> None:
    """redux.sync."""
    kind, operation = kind_at_end(i), i.modifiers[1]
    flags = i.modifiers[2:-1]
    x, mask = w.value(i.operands[1], kind), members(w, i.operands[2])
    w.assign(i.operands[0], f"reduce_warp(M, {i.id}, {operation!r}, {x}, {w.guard}, {mask}, {flags!r})", kind)


@called_by_code
def reduce_warp(m, i: int, operation: str, x: np.ndarray, mask, member_mask, flags: tuple) -> np.ndarray:
    """add, min, max, and, or, xor over the lanes that are present."""
    present = m.lanes_present(i, mask, member_mask)
    x = m.by_warp(x)
    dtype = x.dtype.type
    if x.dtype.kind == "f":
        x = np.abs(x) if "abs" in flags else x
        function = {"min": np.minimum, "max": np.maximum} if "NaN" in flags else {"min": np.fmin, "max": np.fmax}
        start = dtype(np.inf if operation == "min" else -np.inf)
        return m.by_thread(function[operation].reduce(np.where(present, x, start), axis=2, keepdims=True))
    info = np.iinfo(x.dtype)
    start = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(operation, 0)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[operation]  # fmt: skip
    return m.by_thread(function.reduce(np.where(present, x, dtype(start)), axis=2, keepdims=True, dtype=x.dtype))


@emits("elect")
def emit_election(w: Writer, i: Instruction) -> None:
    """elect.sync, whose leader is the first lane."""
    if i.modifiers != ("sync",):
        raise UnknownPTX("this election")
    to, mask = i.operands[0], members(w, i.operands[1])
    assert isinstance(to, Vector)
    w.line(f"leader_, elected_ = elect(M, {i.id}, {w.guard}, {mask})")
    if not isinstance(to.items[0], Sink):
        w.assign(to.items[0], "leader_", "b32")
    w.assign(to.items[1], "elected_", "pred")


@called_by_code
def elect(m, i: int, mask, member_mask) -> tuple[np.ndarray, np.ndarray]:
    """The first lane that is present, and a predicate that is true in it alone."""
    present = m.lanes_present(i, mask, member_mask)
    leader = present.argmax(2, keepdims=True)
    return m.by_thread(leader.astype(u4)), m.by_thread((leader == LANES) & present)


@emits("activemask")
def emit_active_mask(w: Writer, i: Instruction) -> None:
    """activemask."""
    w.assign(i.operands[0], f"active_lanes(M, {w.guard})", "b32")


@called_by_code
def active_lanes(m, mask) -> np.ndarray:
    """The lanes that run."""
    present = m.lanes_present(None, mask, None)
    return m.by_thread((present << LANES).sum(2, keepdims=True).astype(u4))
