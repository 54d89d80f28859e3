"""The blocks of a grid that run in lockstep: their memory, what is checked of it and what is counted.

Registers are numpy arrays [C, T], blocks by threads, or [C, 1] and [1, 1] where they are uniform.
"""

import ctypes
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .numbers import *  # noqa: F403
from .numbers import u1, u2, u4, u8

VIEW = {1: u1, 2: u2, 4: u4, 8: u8}
MANY = -2


@dataclass
class Region:
    """Memory a kernel may touch: of one tensor. `valid`: which bytes; None: all of them."""

    name: str
    start: int
    nbytes: int
    valid: np.ndarray | None = None

    def __post_init__(self):
        raw = (ctypes.c_char * self.nbytes).from_address(self.start) if self.nbytes else b""
        self.views = {w: np.frombuffer(raw, VIEW[w], self.nbytes // w) for w in VIEW}
        self.end = self.start + self.nbytes


@dataclass
class Report:
    """What a launch did."""

    faults: dict = field(default_factory=dict)  # (kind, instruction) -> message
    count: Counter = field(default_factory=Counter)  # (instruction id, what) -> number
    blocks: Counter = field(default_factory=Counter)  # basic block -> warps that ran it


class Machine:
    def __init__(self, kernel, code, params, regions, grid, ids, shared, report, granule, check=True, stats=True):
        self.k, self.code, self.params, self.report = kernel, code, params, report
        self.regions = sorted(regions, key=lambda r: r.start)
        self.starts = np.array([r.start for r in self.regions], u8)
        self.ends = np.array([r.end for r in self.regions], u8)
        self.grid, self.check, self.stats = grid, check, stats
        self.T, self.W = kernel.threads, -(-kernel.threads // 32)
        self.C = len(ids)
        x, y, z = grid
        self.ctaid = [v.astype(u4)[:, None] for v in (ids % x, ids // x % y, ids // (x * y))]
        self.tid = np.arange(self.T, dtype=u4)[None]
        self.warp = (np.arange(self.T) // 32).astype(np.int16)[None]
        self.shared = shared
        self.S = -(-max(shared, 16) // 16) * 16
        self.smem = np.full((self.C, self.S), 0xA7, u1)
        self.g = granule
        G = self.S // granule
        self.we = np.zeros((self.C, G), np.int32)  # epoch of the last write; 0: none
        self.ww = np.zeros((self.C, G), np.int16)  # its warp
        self.re = np.zeros((self.C, G), np.int32)
        self.rw = np.zeros((self.C, G), np.int16)
        self.pend = np.zeros((self.C, G), bool)
        self.epoch = np.ones((self.C, 1), np.int32)
        self.fences, self.wf = 1, np.zeros((self.C, G), np.int32)  # proxy fences so far; when a granule was written
        self.wg_open, self.wg_groups = [], []
        self.open, self.groups = [], []
        self.R = [np.array([[0xDE if b == 8 else 0xDEAD if b == 16 else 0xDEADBEEF if b == 32 else 0xDEADBEEFDEADBEEF]], VIEW[b // 8])
                  if b > 1 else np.zeros((1, 1), bool) for b in kernel.regs.values()]  # fmt: skip
        self.act = None

    def take_blocks(self, keep):
        """A machine of some of the blocks."""
        new = object.__new__(Machine)
        new.__dict__.update(self.__dict__)
        new.C = int(keep.sum())
        new.ctaid = [v[keep] for v in self.ctaid]
        for n in ("smem", "we", "ww", "re", "rw", "pend", "epoch", "wf"):
            setattr(new, n, getattr(self, n)[keep])
        pick = lambda a: a[keep] if a is not None and a.shape[0] == self.C and a.shape[0] > 1 else a  # noqa: E731
        new.R = [pick(r) for r in self.R]
        again = lambda ops: [tuple(pick(a) if i < 2 else a for i, a in enumerate(op)) for op in ops]  # noqa: E731
        new.wg_open, new.wg_groups = again(self.wg_open), [again(g) for g in self.wg_groups]
        new.open, new.groups = again(self.open), [again(g) for g in self.groups]
        return new

    # ---- control
    def run(self, at=0):
        """Run to the end; where blocks of the grid part, each part goes its own way."""
        work = [(self, at)]
        while work:
            m, b = work.pop()
            while b != -1:
                code = m.code[b]
                m.report.blocks[b] += m.C * m.W
                p = code.run(m, m.R, None)
                if code.cond is None:
                    b = code.target if code.target is not None else b + 1
                    continue
                p = np.broadcast_to(p, (p.shape[0], m.T)) if p.shape[1] > 1 else p
                some, every = p.any(1), p.all(1)
                if every.all():
                    b = code.target
                elif not some.any():
                    b = b + 1
                elif (some == every).all():
                    some = np.broadcast_to(some, (m.C,))
                    work.append((m.take_blocks(~some), b + 1))
                    m, b = m.take_blocks(some), code.target
                else:
                    b = m.diverged(b, np.where(p, code.target, b + 1))

    def diverged(self, b, pc):
        """Threads of a block part: the lowest place runs first, until they meet. Returns where they do."""
        last = len(self.code)
        pc = np.broadcast_to(np.where(pc == -1, last, pc), (self.C, self.T)).copy()
        self.report.count[b, "divergent"] += 1
        while True:
            b = int(pc.min())
            act = pc == b
            if act.all():
                self.act = None
                return -1 if b == last else b
            self.act = act
            code = self.code[b]
            self.report.blocks[b] += int(act.reshape(self.C, self.W, -1).any(2).sum())
            p = code.run(self, self.R, act)
            there = last if code.target == -1 else b + 1 if code.target is None else code.target
            pc[act] = there if code.cond is None else np.where(np.broadcast_to(p, act.shape), there, b + 1)[act]

    # ---- faults
    def fault(self, i, kind, text):
        ins = self.code.ins[i]
        key = kind, i
        if key not in self.report.faults:
            self.report.faults[key] = text

    def where(self, bad):
        """The first thread of a mask, in words."""
        bad = np.broadcast_to(bad, (self.C, self.T) if bad.ndim == 2 and bad.shape[1] in (1, self.T) else bad.shape)
        c, t = np.argwhere(bad)[0][:2]
        return f"block {tuple(int(v[c, 0]) for v in self.ctaid)} thread {int(t)}, {int(bad.sum())} threads in all"

    def mask(self, p):
        if self.act is None:
            return p
        return self.act if p is None else p & self.act

    # ---- global memory
    def resolve(self, i, a, m, size, kind):
        """-> [(region, mask or None)], with what lies outside taken out of the mask."""
        ok_align = (a & u8(size - 1)) == 0 if size > 1 else None
        if ok_align is not None:
            bad = ~ok_align if m is None else ~ok_align & m
            if bad.any():
                self.fault(i, "misaligned", f"{kind} of {size} bytes at an address that is no multiple; {self.where(bad)}")
                m = ok_align if m is None else m & ok_align
        n = np.searchsorted(self.starts, a, "right") - 1
        inside = (n >= 0) & (a + u8(size) <= self.ends[n])
        bad = ~inside if m is None else ~inside & m
        if bad.any():
            first = np.broadcast_to(a, bad.shape)[bad][0]
            near = min(self.regions, key=lambda r: min(abs(int(first) - r.start), abs(int(first) - r.end)))
            self.fault(i, "out of bounds", f"{kind} of {size} bytes at {int(first) - near.start:+} of {near.name} "
                       f"({near.nbytes} bytes); {self.where(bad)}")  # fmt: skip
            m = inside if m is None else m & inside
        out = []
        live = np.unique(n if m is None else n[m])
        for k in live:
            r = self.regions[k]
            mk = m if len(live) == 1 else (n == k if m is None else m & (n == k))
            if r.valid is not None:
                at = (a - u8(r.start)).view(np.int64)
                at = np.where(mk, at, 0) if mk is not None else at
                bad = np.zeros(at.shape, bool)
                for s in range(0, size, 2 if size > 1 else 1):
                    bad |= ~r.valid[at + s]
                bad = bad if mk is None else bad & mk
                if bad.any():
                    off = int(np.broadcast_to(at, bad.shape)[bad][0])
                    self.fault(i, "outside its tensor", f"{kind} of {size} bytes at byte {off} of the buffer of {r.name}, "
                               f"which is no element of it; {self.where(bad)}")  # fmt: skip
            out.append((r, mk))
        return out

    def ld_global(self, i, a, p, w, n, old):
        m, size = self.mask(p), w * n
        old = old or [np.zeros((1, 1), VIEW[w])] * n
        if m is not None:
            a, m, *old = np.broadcast_arrays(a, m, *old)
        if self.stats:
            self.count_global(i, a, m, size)
        got = None if m is None else [o.copy() for o in old]
        for r, mk in self.resolve(i, a, m, size, "load"):
            idx = (a - u8(r.start)).view(np.int64) // w
            if mk is None:
                return [r.views[w][idx + j] for j in range(n)]
            if got is None:
                got = [np.broadcast_to(o, a.shape).copy() for o in old]
            for j in range(n):
                got[j][mk] = r.views[w][idx[mk] + j]
        return got if got is not None else [np.broadcast_to(o, a.shape) for o in old]

    def st_global(self, i, a, p, w, vals):
        m, n = self.mask(p), len(vals)
        arrays = np.broadcast_arrays(a, *vals, *([m] if m is not None else []), np.empty((self.C, self.T if self.T else 1)))
        a, vals = arrays[0], arrays[1:1 + n]
        m = arrays[1 + n] if m is not None else None
        if self.stats:
            self.count_global(i, a, m, w * n)
        for r, mk in self.resolve(i, a, m, w * n, "store"):
            idx = (a - u8(r.start)).view(np.int64) // w
            idx = idx if mk is None else idx[mk]
            for j, v in enumerate(vals):
                r.views[w][idx + j] = v if mk is None else v[mk]

    def count_global(self, i, a, m, size):
        c = self.report.count
        if m is None and a.shape[1] == 1:
            n = self.C * self.W
            c[i, "requests"] += n
            c[i, "sectors"] += n
            c[i, "bytes"] += n * 32 * size
            c[i, "ideal"] += n
            return
        shape = (self.C, self.T)
        s = (np.broadcast_to(a, shape) >> u8(5)).reshape(-1, min(32, self.T))
        if m is not None:
            m = np.broadcast_to(m, shape).reshape(s.shape)
            live = m.any(1)
            if not live.any():
                return
            s, m = np.where(m, s, u8(2**64 - 1))[live], m[live]
        low = np.sort(s, axis=1)
        distinct = (low[:, 1:] != low[:, :-1]).sum(1) + 1
        lanes = np.full(len(s), s.shape[1]) if m is None else m.sum(1)
        if m is not None:
            distinct = distinct - ~m.all(1)
        c[i, "requests"] += len(s)
        c[i, "sectors"] += int(distinct.sum())
        c[i, "bytes"] += int(lanes.sum()) * size
        c[i, "ideal"] += int((-(-lanes * size // 32)).sum())

    # ---- shared memory
    def sbounds(self, i, a, m, size, kind):
        bad = (a.astype(np.int64) + size > self.shared) | ((a & u4(size - 1)) != 0)
        if m is not None:
            bad = bad & m
        if bad.any():
            first = int(np.broadcast_to(a, bad.shape)[bad][0])
            self.fault(i, "out of bounds", f"shared {kind} of {size} bytes at {first} of {self.shared}; {self.where(bad)}")
            m = ~bad if m is None else m & ~bad
            m = np.broadcast_to(m, np.broadcast_shapes(m.shape, a.shape))
        return m

    def flat(self, a, m, size):
        """(granules, warps, epochs), each of every granule the access covers, masked ones left out."""
        shape = (self.C, self.T)
        at = (np.broadcast_to(a, shape).astype(np.int64) + (np.arange(self.C, dtype=np.int64) * self.S)[:, None]) // self.g
        warp, ep = np.broadcast_to(self.warp, shape), np.broadcast_to(self.epoch, shape)
        if m is not None:
            m = np.broadcast_to(m, shape)
            at, warp, ep = at[m], warp[m], ep[m]
        k = size // self.g
        at, warp, ep = at.ravel(), warp.ravel(), ep.ravel()
        if k > 1:
            at = (at[:, None] + np.arange(k)).ravel()
            warp, ep = np.repeat(warp, k), np.repeat(ep, k)
        return at, warp, ep

    def reads(self, i, a, m, size):
        at, warp, ep = self.flat(a, m, size)
        we, ww, rw, re = self.we.ravel(), self.ww.ravel(), self.rw.ravel(), self.re.ravel()
        e = we[at]
        if (e == 0).any():
            self.fault(i, "uninitialised", f"shared memory read at byte {int(at[e == 0][0] * self.g % self.S)} that nothing wrote; {int((e == 0).sum())} granules")
        bad = (e == ep) & (ww[at] != warp)
        if bad.any():
            k = int(np.argmax(bad))
            self.fault(i, "race", f"read by warp {warp[k]} of shared byte {int(at[k] * self.g % self.S)} that warp {ww[at[k]]} wrote since the last barrier; {int(bad.sum())} granules")
        if self.pend.any():
            bad = self.pend.ravel()[at]
            if bad.any():
                self.fault(i, "not waited for", f"read of shared byte {int(at[bad][0] * self.g % self.S)}, to which cp.async may still be copying; {int(bad.sum())} granules")
        other = (re[at] == ep) & (rw[at] != warp)
        rw[at] = warp
        re[at] = ep
        other |= rw[at] != warp
        rw[at[other]] = MANY

    def writes(self, i, a, m, size, async_=False):
        at, warp, ep = self.flat(a, m, size)
        we, ww, rw, re = self.we.ravel(), self.ww.ravel(), self.rw.ravel(), self.re.ravel()
        bad = (re[at] == ep) & (rw[at] != warp)
        if bad.any():
            k = int(np.argmax(bad))
            self.fault(i, "race", f"write by warp {warp[k]} of shared byte {int(at[k] * self.g % self.S)} that {'several warps' if rw[at[k]] == MANY else f'warp {rw[at[k]]}'} read since the last barrier; {int(bad.sum())} granules")
        if self.pend.any() and self.pend.ravel()[at].any():
            self.fault(i, "not waited for", "write of shared memory to which cp.async may still be copying")
        if async_:
            self.pend.ravel()[at] = True
        for group in [self.wg_open, *self.wg_groups] if not async_ or True else ():
            for mark, _ in group:
                if mark.ravel()[at].any():
                    self.fault(i, "not waited for", "write of shared memory that wgmma may still be reading")
        self.wf.ravel()[at] = self.fences
        other = (we[at] == ep) & (ww[at] != warp)
        ww[at] = warp
        we[at] = ep
        other |= ww[at] != warp
        ww[at[other]] = MANY

    def ld_shared(self, i, a, p, w, n, old):
        m, size = self.mask(p), w * n
        old = old or [np.zeros((1, 1), VIEW[w])] * n
        if m is not None:
            a, m = np.broadcast_arrays(a, m)
        m = self.sbounds(i, a, m, size, "load")
        if self.check:
            self.reads(i, a, m, size)
        if self.stats:
            self.count_shared(i, a, m, size)
        idx = (a.astype(np.int64) + (np.arange(self.C) * self.S)[:, None]) // w
        flat = self.smem.reshape(-1).view(VIEW[w])
        if m is None:
            return [flat[idx + j] for j in range(n)]
        idx = np.where(m, idx, 0)
        return [np.where(m, flat[idx + j], o) for j, o in zip(range(n), old)]

    def st_shared(self, i, a, p, w, vals):
        m, n = self.mask(p), len(vals)
        m = self.sbounds(i, a, m, w * n, "store")
        if self.check:
            self.writes(i, a, m, w * n)
        if self.stats:
            self.count_shared(i, a, m, w * n)
        shape = (self.C, self.T)
        idx = (np.broadcast_to(a, shape).astype(np.int64) + (np.arange(self.C) * self.S)[:, None]) // w
        flat = self.smem.reshape(-1).view(VIEW[w])
        if m is not None:
            m = np.broadcast_to(m, shape)
            idx = idx[m]
        for j, v in enumerate(vals):
            v = np.broadcast_to(v, shape)
            flat[idx + j] = v if m is None else v[m]

    def count_shared(self, i, a, m, size):
        shape = (self.C, self.T)
        lanes = 32 if size <= 4 else 16 if size == 8 else 8
        w = (np.broadcast_to(a, shape) >> u4(2)).astype(np.int64).reshape(-1, lanes)
        if m is not None:
            w = np.where(np.broadcast_to(m, shape).reshape(w.shape), w, -1)
            w = w[(w >= 0).any(1)]
            if not len(w):
                return
        k = max(1, size // 4)
        if k > 1:
            w = np.where(w[..., None] >= 0, w[..., None] + np.arange(k), -1).reshape(len(w), -1)
        c = self.report.count
        c[i, "phases"] += len(w)
        c[i, "wavefronts"] += self.wavefronts(w)

    @staticmethod
    def wavefronts(w):
        """Of phases [N, words]: the most words of one bank, summed."""
        s = np.sort(w, axis=1)
        new = np.ones(s.shape, bool)
        new[:, 1:] = s[:, 1:] != s[:, :-1]
        new &= s >= 0
        key = (np.arange(len(s))[:, None] * 32 + (s & 31))[new]
        return int(np.bincount(key, minlength=32 * len(s)).reshape(-1, 32).max(1).sum())

    def cp_async(self, i, dst, src, p, size, used):
        m = self.mask(p)
        shape = (self.C, self.T)
        dst = np.broadcast_to(dst, shape)
        m = self.sbounds(i, dst, m, size, "cp.async")
        if self.check:
            self.writes(i, dst, m, size, async_=True)
        if self.stats:
            self.count_shared(i, dst, m, size)
        full = None if m is None else np.broadcast_to(m, shape)
        read = full
        if used is not None:
            some = np.broadcast_to(used != 0, shape)
            odd = (used != 0) & (used != size)
            if odd.any():
                raise NotImplementedError("cp.async of part of its size")
            read = some if full is None else full & some
        zero = np.zeros((1, 1), u8 if size >= 8 else u4)
        w = 8 if size >= 8 else 4
        vals = self.ld_global(i, np.broadcast_to(src, shape), read, w, size // w, [zero] * (size // w)) if self.act is None else self._inactive()
        self.report.count[i, "async"] += 1
        idx = (dst.astype(np.int64) + (np.arange(self.C) * self.S)[:, None]) // w
        flat = self.smem.reshape(-1).view(VIEW[w])
        idx = idx if full is None else idx[full]
        for j, v in enumerate(vals):
            v = np.broadcast_to(v, shape)
            flat[idx + j] = v if full is None else v[full]
        self.open.append((dst, full, size))

    def _inactive(self):
        raise NotImplementedError("cp.async where threads of a block have parted")

    def commit(self):
        self.groups.append(self.open)
        self.open = []

    def wait(self, n):
        while len(self.groups) > n:
            for dst, m, size in self.groups.pop(0):
                if self.check:
                    at, warp, ep = self.flat(dst, m, size)
                    self.pend.ravel()[at] = False
                    self.we.ravel()[at] = ep
                    self.ww.ravel()[at] = warp

    def bar(self, i):
        if self.act is not None:
            some, every = self.act.any(1), self.act.all(1)
            if (some != every).any():
                self.fault(i, "barrier", f"bar.sync that not every thread of a block reaches; {self.where(self.act)}")
            self.epoch += some[:, None].astype(np.int32)
        else:
            self.epoch += 1

    def ldmatrix(self, i, a, n, trans):
        a = np.broadcast_to(a, (self.C, self.T))
        lanes = np.arange(self.T) % 32 < 8 * n
        m = None if n == 4 else np.broadcast_to(lanes, a.shape)
        m = self.sbounds(i, a, m, 16, "ldmatrix")
        if self.check:
            self.reads(i, a, m, 16)
        if self.stats:
            self.count_shared(i, a, m, 16)
        base = (np.arange(self.C) * self.S)[:, None, None, None]
        rows = a.reshape(self.C, self.W, 4, 8).astype(np.int64)[:, :, :n] + base
        lane = np.arange(32)
        if m is not None:
            rows = np.where(m.reshape(self.C, self.W, 4, 8)[:, :, :n], rows, 0)
        if not trans:
            at = (rows[..., lane // 4] + 4 * (lane % 4)) // 4
            got = self.smem.reshape(-1).view(u4)[at]
        else:
            flat = self.smem.reshape(-1).view(u2)
            low = flat[(rows[..., 2 * (lane % 4)] + 2 * (lane // 4)) // 2].astype(u4)
            high = flat[(rows[..., 2 * (lane % 4) + 1] + 2 * (lane // 4)) // 2].astype(u4)
            got = low | (high << u4(16))
        return [np.ascontiguousarray(got[:, :, j]).reshape(self.C, self.T) for j in range(n)]

    def proxy_fence(self):
        self.fences += 1

    def wg_commit(self):
        self.wg_groups.append(self.wg_open)
        self.wg_open = []

    def wg_wait(self, n):
        while len(self.wg_groups) > n:
            self.wg_groups.pop(0)

    def stmatrix(self, i, a, p, vals, trans):
        n = len(vals)
        if self.act is not None:
            raise NotImplementedError("stmatrix where threads of a block have parted")
        a = np.broadcast_to(a, (self.C, self.T))
        m = None if n == 4 else np.broadcast_to(np.arange(self.T) % 32 < 8 * n, a.shape)
        m = self.mask(p) if m is None else m if p is None else m & p
        m = self.sbounds(i, a, m, 16, "stmatrix")
        if self.check:
            self.writes(i, a, m, 16)
        if self.stats:
            self.count_shared(i, a, m, 16)
        lane = np.arange(32)
        base = (np.arange(self.C) * self.S)[:, None, None, None]
        rows = a.reshape(self.C, self.W, 4, 8).astype(np.int64)[:, :, :n] + base
        live = None if m is None else np.broadcast_to(m, a.shape).reshape(self.C, self.W, 4, 8)[:, :, :n]
        x = np.stack([np.broadcast_to(v, (self.C, self.T)).reshape(self.C, self.W, 32) for v in vals], 2)
        flat = self.smem.reshape(-1).view(u2)
        for half in (0, 1):
            v = ((x >> u4(16 * half)) & u4(0xFFFF)).astype(u2)
            row, column = (2 * (lane % 4) + half, lane // 4) if trans else (lane // 4, 2 * (lane % 4) + half)
            at = (rows[..., row] + 2 * column) // 2
            if live is None:
                flat[at] = v
            else:
                ok = live[..., row]
                flat[at[ok]] = v[ok]

    def tile(self, i, desc, rows, trans):
        """[C, warp groups, rows, 16] numbers of 16 bits that a descriptor names: rows of m or n, columns of k."""
        if self.T % 128:
            raise NotImplementedError("wgmma in a block without whole warp groups")
        G = self.T // 128
        d = np.broadcast_to(desc, (self.C, self.T)).reshape(self.C, G, 128)
        if (d != d[..., :1]).any():
            self.fault(i, "descriptor", "the threads of a warp group hold different ones")
        d = d[..., 0].astype(np.uint64)
        field = lambda at, bits: ((d >> u8(at)) & u8(2**bits - 1)).astype(np.int64)  # noqa: E731
        start, lead, stride, mode = field(0, 14) * 16, field(16, 14) * 16, field(32, 14) * 16, field(62, 2)
        if len(np.unique(mode)) > 1 or field(49, 3).any():
            raise NotImplementedError("descriptors of several kinds, or a base offset")
        mode = int(mode.flat[0])
        if mode == 0:
            raise NotImplementedError("descriptors without swizzle")
        width = {1: 128, 2: 64, 3: 32}[mode]  # bytes
        r, k = np.arange(rows)[:, None], np.arange(16)[None]
        start, lead, stride = (x[..., None, None] for x in (start, lead, stride))
        if trans:
            at = start + (r // (width // 2)) * lead + (r % (width // 2)) * 2 + (k // 8) * stride + (k % 8) * width
        else:
            at = start + (r // 8) * stride + (r % 8) * width + k * 2
        at ^= ((at >> 7) & (width // 16 - 1)) << 4
        bad = at + 2 > self.shared
        if bad.any():
            self.fault(i, "out of bounds", f"wgmma reads shared byte {int(at[bad][0])} of {self.shared}")
            at = np.minimum(at, self.shared - 2)
        flat = at + (np.arange(self.C) * self.S)[:, None, None, None]
        if self.check:
            g = np.unique(flat // self.g)
            we, ep = self.we.ravel()[g], self.epoch.ravel()[g // (self.S // self.g)]
            if (we == 0).any():
                self.fault(i, "uninitialised", f"wgmma reads shared memory that nothing wrote; {int((we == 0).sum())} granules")
            if (we == ep).any():
                self.fault(i, "race", f"wgmma reads shared memory written since the last barrier; {int((we == ep).sum())} granules")
            if self.pend.ravel()[g].any():
                self.fault(i, "not waited for", "wgmma reads shared memory to which cp.async may still be copying")
            if ((we > 0) & (self.wf.ravel()[g] >= self.fences)).any():
                self.fault(i, "no proxy fence", "wgmma reads shared memory written since the last fence.proxy.async")
            self.re.ravel()[g], self.rw.ravel()[g] = ep, MANY
            mark = np.zeros(self.we.shape, bool)
            mark.ravel()[g] = True
            self.wg_open.append((mark, None))
        return self.smem.reshape(-1).view(u2)[flat // 2]

    def wgmma(self, i, kind, n, old, a, b, scale, trans):
        if self.act is not None:
            raise NotImplementedError("wgmma where threads of a block have parted")
        C, G = self.C, self.T // 128
        full = (C, self.T)
        number = (lambda h: h.view(np.float16).astype(np.float32)) if kind == "f16" else bf_f32  # noqa: F405
        if isinstance(a, list):
            x = np.stack([np.broadcast_to(r, full) for r in a])  # a register: rows half, columns half
            x = halves(x).reshape(2, 2, C, G, 4, 8, 4, 2)  # noqa: F405  [kh, rh, C, G, warp, g, t, h]
            x = x.transpose(2, 3, 4, 1, 5, 0, 6, 7).reshape(C, G, 64, 16)
        else:
            x = self.tile(i, a, 64, trans[0])
        y = self.tile(i, b, n, trans[1])
        d = np.matmul(number(x), number(y).swapaxes(2, 3))  # [C, G, 64, n]
        d = d.reshape(C, G, 4, 2, 8, n // 8, 4, 2).transpose(5, 3, 7, 0, 1, 2, 4, 6)  # [j, rh, h, C, G, warp, g, t]
        d = np.ascontiguousarray(d).reshape(n // 2, C, self.T)
        self.report.count[i, "mma"] += C * G
        if scale.all():
            return [(o.view(np.float32) + d[j]).view(u4) for j, o in enumerate(old)]
        return [np.where(scale, o.view(np.float32) + d[j], d[j]).astype(np.float32).view(u4) for j, o in enumerate(old)]

    def shfl(self, i, mode, a, b, clamp):
        if a.shape[1] == 1:
            return a
        if self.act is not None:
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
        j = (np.broadcast_to(b, (self.C, self.T)).reshape(self.C, -1, 32) & u4(31)).astype(np.int64)
        return np.take_along_axis(np.broadcast_to(x, j.shape), j, 2).reshape(self.C, self.T)

    def mma(self, i, kind, ka, a, b, c, plan):
        if self.act is not None:
            raise NotImplementedError("mma where threads of a block have parted")
        return mma_run(self.C, self.W, kind, ka, a, b, c, plan)  # noqa: F405
