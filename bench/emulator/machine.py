"""The blocks of a grid that run in lockstep: their memory, what is checked of it and what is counted.

Registers are numpy arrays [C, T], blocks by threads, or [C, 1] and [1, 1] where they are uniform.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .global_memory import GlobalMemory
from .numbers import u1, u2, u4, u8
from .shared_memory import SharedMemory

VIEW = {1: u1, 2: u2, 4: u4, 8: u8}


@dataclass
class Report:
    """What a launch did."""

    faults: dict = field(default_factory=dict)  # (kind, instruction) -> message
    count: Counter = field(default_factory=Counter)  # (instruction id, what) -> number
    blocks: Counter = field(default_factory=Counter)  # basic block -> warps that ran it


class Machine:
    def __init__(self, kernel, code, params, regions, grid, ids, shared, report, check=True, stats=True):
        self.k, self.program, self.params, self.report = kernel, code, params, report
        self.grid, self.checks, self.counters, self.counts = grid, check, stats, report.count
        self.threads, self.warps = kernel.threads, -(-kernel.threads // 32)
        self.block_ids, self.blocks = ids, len(ids)
        x, y, z = grid
        self.ctaid = [v.astype(u4)[:, None] for v in (ids % x, ids // x % y, ids // (x * y))]
        self.tid = np.arange(self.threads, dtype=u4)[None]
        self.R = [np.array([[0xDE if b == 8 else 0xDEAD if b == 16 else 0xDEADBEEF if b == 32 else 0xDEADBEEFDEADBEEF]], VIEW[b // 8])
                  if b > 1 else np.zeros((1, 1), bool) for b in kernel.regs.values()]  # fmt: skip
        self.active = None
        self.global_memory = GlobalMemory(self, regions)
        self.shared_memory = SharedMemory(self, shared)

    def select(self, keep):
        """A machine of some of the blocks."""
        new = object.__new__(Machine)
        new.__dict__.update(self.__dict__)
        new.blocks, new.block_ids = int(keep.sum()), self.block_ids[keep]
        new.ctaid = [v[keep] for v in self.ctaid]
        new.R = [r[keep] if r.shape[0] == self.blocks and r.shape[0] > 1 else r for r in self.R]
        new.global_memory = self.global_memory.select(new, keep)
        new.shared_memory = self.shared_memory.select(new, keep)
        return new

    # ---- control
    def run(self, at=0):
        """Run to the end; where blocks of the grid part, each part goes its own way."""
        work = [(self, at)]
        while work:
            m, b = work.pop()
            while b != -1:
                code = m.program[b]
                m.report.blocks[b] += m.blocks * m.warps
                p = code.run(m, m.R, None)
                if code.cond is None:
                    b = code.target if code.target is not None else b + 1
                    continue
                p = np.broadcast_to(p, (p.shape[0], m.threads)) if p.shape[1] > 1 else p
                some, every = p.any(1), p.all(1)
                if every.all():
                    b = code.target
                elif not some.any():
                    b = b + 1
                elif (some == every).all():
                    some = np.broadcast_to(some, (m.blocks,))
                    work.append((m.select(~some), b + 1))
                    m, b = m.select(some), code.target
                else:
                    b = m.diverged(b, np.where(p, code.target, b + 1))

    def diverged(self, b, pc):
        """Threads of a block part: the lowest place runs first, until they meet. Returns where they do."""
        last = len(self.program)
        pc = np.broadcast_to(np.where(pc == -1, last, pc), (self.blocks, self.threads)).copy()
        self.report.count[b, "divergent"] += 1
        while True:
            b = int(pc.min())
            act = pc == b
            if act.all():
                self.active = None
                return -1 if b == last else b
            self.active = act
            code = self.program[b]
            self.report.blocks[b] += int(act.reshape(self.blocks, self.warps, -1).any(2).sum())
            p = code.run(self, self.R, act)
            there = last if code.target == -1 else b + 1 if code.target is None else code.target
            pc[act] = there if code.cond is None else np.where(np.broadcast_to(p, act.shape), there, b + 1)[act]

    # ---- faults
    def fault(self, i, kind, text, bad=None):
        if (kind, i) in self.report.faults:
            return
        if bad is not None:
            bad = np.broadcast_to(bad, (self.blocks, self.threads))
            c, t = np.argwhere(bad)[0]
            text += f"; block {tuple(int(v[c, 0]) for v in self.ctaid)} thread {int(t)}, {int(bad.sum())} threads in all"
        self.report.faults[kind, i] = text

    def shfl(self, i, mode, a, b, clamp):
        if a.shape[1] == 1:
            return a
        if self.active is not None:
            self.report.count[i, "shuffle while parted"] += 1
        x = a.reshape(a.shape[0], -1, 32)
        lane = np.arange(32)
        b = np.asarray(b)
        if b.size == 1:
            v = int(b.ravel()[0]) & 31
            if mode == "bfly":
                j = lane ^ v
            elif mode == "idx":
                j = lane * 0 + v
            elif mode == "down":
                j = np.where(lane + v < 32, lane + v, lane)
            else:
                j = np.where(lane - v >= 0, lane - v, lane)
            return np.ascontiguousarray(x[..., j]).reshape(a.shape)
        if mode != "idx":
            raise NotImplementedError("shfl by a register")
        j = (np.broadcast_to(b, (self.blocks, self.threads)).reshape(self.blocks, -1, 32) & u4(31)).astype(np.int64)
        return np.take_along_axis(np.broadcast_to(x, j.shape), j, 2).reshape(self.blocks, self.threads)
