"""Shared memory of the blocks that run in lockstep: its bytes, copies and barriers; `SharedHistory` has the checks."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from ..arithmetic.fragments import multiply, multiply_warp_group
from .atomics import apply_atomic
from .lockstep import Lockstep
from .matrix_descriptors import read_descriptor
from .regions import WORD
from .shared_access import Access
from .shared_history import SharedHistory
from .vectors import join_words, split_words

Array = np.ndarray
UNWRITTEN = 0xA7  # of every byte
REMEMBERED = 4096  # accesses of a kernel, at most


class SharedMemory:
    """Shared memory of a machine's blocks. Address, mask and values are arrays [1 or blocks, 1 or threads].

    accesses   those of the program that were checked before, by instruction, addresses and mask
    groups     the copies of cp.async that were committed, oldest first; open: those that were not
    """

    def __init__(self, machine: Lockstep, size: int):
        self.machine, self.size = machine, size
        padded = -(-max(size, 16) // 16) * 16
        self.bytes = np.full((machine.blocks, padded), UNWRITTEN, np.uint8)
        self.views = {width: self.bytes.view(word) for width, word in WORD.items()}
        granule = machine.program.memory.shared_unit
        self.history = SharedHistory(machine, granule, padded // granule) if machine.checks else None
        self.accesses: dict = machine.program.remembered.setdefault(f"shared, {size} bytes", {})
        self.groups: deque[list[Access]] = deque()
        self.open: list[Access] = []
        self.streams: deque[list[Access]] = deque()
        self.open_streams: list[Access] = []

    def select(self, machine: Lockstep, keep: Array) -> SharedMemory:
        """The memory of some of the blocks."""
        new = object.__new__(SharedMemory)
        new.__dict__.update(self.__dict__, machine=machine)
        new.bytes = self.bytes[keep]
        new.views = {width: new.bytes.view(word) for width, word in WORD.items()}
        granules = self.history.granules if self.history else 1
        pick = lambda some: [access.select(keep, granules) for access in some]  # noqa: E731
        new.open, new.open_streams = pick(self.open), pick(self.open_streams)
        new.groups, new.streams = deque(map(pick, self.groups)), deque(map(pick, self.streams))
        new.history = self.history.select(machine, keep) if self.history else None
        return new

    # ---- accesses
    def access(self, i: int, address: Array, mask: Array | None, size: int, verb: str) -> Access:
        """The access of an instruction, checked for its bounds and counted."""
        active = self.machine.active
        if active is not None:
            mask = active if mask is None else active & mask
        if len(address) > 1 and (address == address[:1]).all():
            address = address[:1]
        if mask is not None and len(mask) > 1 and (mask == mask[:1]).all():
            mask = mask[:1]
        alike = len(address) == 1 and (mask is None or len(mask) == 1)
        key = (i, address.tobytes(), None if mask is None else mask.tobytes()) if alike else None
        access = self.accesses.get(key) if alike else None
        if access is None:
            access, correct = self._access(i, address.astype(np.int64), mask, size, verb)
            if alike and correct:
                self.remember(key, access)
        if self.machine.counters:
            times = self.machine.blocks if access.rows == 1 else 1
            phases, wavefronts = access.wavefronts
            self.machine.counts[i, "accesses"] += phases * times
            self.machine.counts[i, "wavefronts"] += wavefronts * times
        return access

    def remember(self, key: Any, access: Any) -> None:
        """Keep an access that is correct, so that it need not be checked again."""
        if len(self.accesses) >= REMEMBERED:
            self.accesses.clear()
        self.accesses[key] = access

    def _access(self, i: int, address: Array, mask: Array | None, size: int, verb: str) -> tuple[Access, bool]:
        """The access without threads that may not, and if there are none such."""
        threads, correct = self.machine.threads, True
        if mask is not None:
            mask = np.broadcast_to(mask, (len(mask), threads))
        for kind, bad, text in (
            ("misaligned", address & (size - 1) != 0, "at {}, which is no multiple of it"),
            ("out of bounds", address + size > self.size, f"at {{}} of {self.size}"),
        ):
            if not bad.any():
                continue
            wrong = bad if mask is None else bad & mask
            if wrong.any():
                first = int(np.broadcast_to(address, wrong.shape)[wrong][0])
                text = f"{verb} {size} bytes of shared memory {text.format(f'byte {first}')}"
                self.machine.fault(i, kind, text, wrong)
                correct = False
            mask = np.broadcast_to(~bad if mask is None else ~bad & mask, (len(wrong), threads))
        if mask is not None:
            address = np.where(mask, address, 0)
        return Access(address, mask, size, threads), correct

    def gather(self, access: Access, width: int, count: int, old: list | None) -> list[Array]:
        """The values that are read, [1 or blocks, 1 or threads] each; masked-off threads keep `old`."""
        unit = access.units(access.size)
        values = split_words(self.take(access.size, unit), width, count)
        if access.mask is None or old is None:
            return values
        return [np.where(access.mask, value, kept) for value, kept in zip(values, old)]

    def take(self, width: int, unit: Array) -> Array:
        """The elements of that width and number, of each block."""
        view = self.views[width]
        if len(unit) == 1:
            return view.take(unit[0], 1)
        return view.reshape(-1).take(unit + self.first_units(width))

    def first_units(self, width: int) -> Array:
        """The number of the first element of each block [blocks, 1], counted through all."""
        return (np.arange(self.machine.blocks) * (self.bytes.shape[1] // width))[:, None]

    def scatter(self, access: Access, values: list[Array], width: int) -> None:
        """Write the values of each thread; of several that write the same bytes the last one stays."""
        shape = (self.machine.blocks, self.machine.threads)
        value = join_words(values, width, shape)
        flat = self.views[access.size].reshape(-1)
        unit = access.units(access.size)
        if access.mask is None:
            at = unit + self.first_units(access.size)
            flat[at if at.shape == shape else np.broadcast_to(at, shape)] = value
        elif access.rows == 1:
            unit = np.broadcast_to(unit, access.mask.shape)
            flat[unit[:, access.lanes] + self.first_units(access.size)] = value[:, access.lanes]
        else:
            mask = np.broadcast_to(access.mask, shape)
            flat[np.broadcast_to(unit + self.first_units(access.size), shape)[mask]] = value[mask]

    # ---- loads and stores
    def load(self, i: int, address: Array, mask: Array | None, width: int, count: int, old: list | None) -> list[Array]:
        """`count` elements of `width` bytes each."""
        access = self.access(i, address, mask, width * count, "reads")
        if self.history:
            self.history.note_read(i, access)
        return self.gather(access, width, count, old)

    def store(self, i: int, address: Array, mask: Array | None, width: int, values: list[Array]) -> None:
        """Write elements of `width` bytes."""
        access = self.access(i, address, mask, width * len(values), "writes")
        conflict = self.history.note_write(i, access) if self.history else None
        if not self.history or (conflict is None and not access.overlaps):
            return self.scatter(access, values, width)
        before = self.gather(access, width, len(values), None)
        self.scatter(access, values, width)
        after = self.gather(access, width, len(values), None)
        self.check_values(i, access, conflict, before, values, after)

    def check_values(
        self,
        i: int,
        access: Access,
        conflict: Array | None,
        before: list[Array],
        values: list[Array],
        after: list[Array],
    ) -> None:
        """A race, where a value differs from what another thread wrote at the same time."""
        shape = (self.machine.blocks, self.machine.threads)
        bad = np.zeros(shape, bool)
        if access.overlaps:
            for value, held in zip(values, after):
                bad |= value != held
        if conflict is not None and self.history:
            history = self.history
            mark = np.zeros(history.rows * history.granules, bool)
            mark[conflict] = True
            first = access.address // history.granule + (np.arange(history.rows) * history.granules)[:, None]
            other = np.zeros(shape, bool)
            for n in range(access.size // history.granule):
                other |= mark[first + n]
            for value, held in zip(values, before):
                bad |= (value != held) & other
        if access.mask is not None:
            bad &= access.mask
        if bad.any():
            first = int(np.broadcast_to(access.address, shape)[bad][0])
            text = f"several threads write different values to shared byte {first}, and nothing orders them"
            self.machine.fault(i, "race", text, bad)

    def atomic(
        self, i: int, operation: str, kind: str, address: Array, mask: Array | None, values: list[Array],
        old: Array | None, order: str, scope: str,
    ) -> Array:  # fmt: skip
        """An atomic operation, in the order of the blocks, then of the threads. Returns the values before."""
        width = values[0].itemsize
        access = self.access(i, address, mask, width, "updates")
        if self.history:
            self.history.note_atomic(i, access)
        shape = (self.machine.blocks, self.machine.threads)
        unit = np.broadcast_to(access.units(width) + self.first_units(width), shape)
        flat = self.views[width].reshape(-1)
        held = None if access.mask is None else np.broadcast_to(access.mask, shape)
        return apply_atomic(flat, unit, held, operation, kind, values, old)

    # ---- cp.async
    def copy_async(
        self, i: int, target: Array, source: Array, mask: Array | None, size: int, source_size: Array | None
    ) -> None:
        """Copy `size` bytes of each thread from global memory; what lies beyond `source_size` of them becomes 0."""
        access = self.access(i, target, mask, size, "copies")
        if self.history:
            self.history.note_write(i, access, copy=True)
        held, zero = access.mask, np.zeros((1, 1), np.uint32)
        words = max(1, size // 4)
        if source_size is not None:
            some = source_size > 0
            if len(some) > 1 and (some == some[:1]).all():
                some = some[:1]
            if ((source_size < size) & some).any():
                return self._copy_partly(i, access, source, source_size)
            held = some if held is None else some & held
            held = None if held.all() else np.broadcast_to(held, (len(held), self.machine.threads))
        values = self.machine.global_memory.copy(i, source, held, 4, words, [zero] * words)
        self.scatter(access, values, 4)
        self.open.append(access)

    def _copy_partly(self, i: int, access: Access, source: Array, source_size: Array) -> None:
        """Copies of fewer bytes than are written, byte by byte."""
        values = []
        for n in range(access.size):
            held = (source_size > n) if access.mask is None else (source_size > n) & access.mask
            held = np.broadcast_to(held, (len(held), self.machine.threads))
            byte = self.machine.global_memory.copy(i, source + np.uint64(n), held, 1, 1, [np.zeros((1, 1), np.uint8)])
            values += byte
        self.scatter(access, values, 1)
        self.open.append(access)

    def commit_copies(self, i: int) -> None:
        """cp.async.commit_group."""
        self.groups.append(self.open)
        self.open = []

    def wait_copies(self, i: int, count: int) -> None:
        """cp.async.wait_group: all but the last `count` groups are there."""
        while len(self.groups) > count:
            for access in self.groups.popleft():
                if self.history:
                    self.history.end_copy(access)

    # ---- matrices
    def matrix_access(self, i: int, address: Array, count: int, mask: Array | None, verb: str) -> Access:
        """The access of ldmatrix or stmatrix: rows of 16 bytes, at the addresses of the first 8 * count lanes."""
        if count < 4:
            lanes = (np.arange(self.machine.threads) % 32 < 8 * count)[None]
            mask = lanes if mask is None else lanes & mask
        return self.access(i, np.broadcast_to(address, (len(address), self.machine.threads)), mask, 16, verb)

    def load_matrix(self, i: int, address: Array, count: int, transposed: bool) -> list[Array]:
        """ldmatrix: `count` matrices of 8 rows of 16 bytes, a register of each per thread."""
        self.whole_warps(i)
        access = self.matrix_access(i, address, count, None, "reads")
        if self.history:
            self.history.next_time(("converged",))
            self.history.note_read(i, access)
        low, high = access.matrix_units(count, transposed)
        if high is None:
            return [self.take(4, unit) for unit in low]
        return [self.take(2, a) | self.take(2, b).astype(np.uint32) << np.uint32(16) for a, b in zip(low, high)]

    def store_matrix(self, i: int, address: Array, mask: Array | None, values: list[Array], transposed: bool) -> None:
        """stmatrix: the reverse of ldmatrix."""
        self.whole_warps(i)
        access = self.matrix_access(i, address, len(values), mask, "writes")
        self.converge()
        conflict = self.history.note_write(i, access) if self.history else None
        before = None if self.history is None or conflict is None else self.history.bytes_of(self.bytes, conflict)
        low, high = access.matrix_units(len(values), transposed)
        shape = (self.machine.blocks, self.machine.threads)
        width = 4 if high is None else 2
        flat, first = self.views[width].reshape(-1), self.first_units(width)
        held = access.matrix_mask(len(values), transposed)
        for n, value in enumerate(values):
            value = np.broadcast_to(value, shape)
            parts = [value] if high is None else [value.astype(np.uint16), (value >> np.uint32(16)).astype(np.uint16)]
            for half, (part, units) in enumerate(zip(parts, (low, high or low))):
                at = np.broadcast_to(units[n] + first, shape)
                if held is None:
                    flat[at] = part
                else:
                    live = np.broadcast_to(held[half][n], shape)
                    flat[at[live]] = part[live]
        if before is not None and self.history and conflict is not None:
            self.history.check_same(i, before, self.history.bytes_of(self.bytes, conflict), conflict)

    def mma(self, i: int, plan: tuple, a: list, b: list, c: list) -> list[Array]:
        """A run of mma.sync as one product; see `fragments.multiply`."""
        self.whole_warps(i)
        machine = self.machine
        machine.counts[i, "mma"] += machine.blocks * machine.warps * len(plan[3]) * plan[2]
        return multiply(machine.program.instructions[i].modifiers, (machine.blocks, machine.warps), plan, a, b, c)

    def wgmma(self, i: int, plan: NamedTuple, old: list, a: Array | list, b: Array, scale: Array) -> list[Array]:
        """wgmma.mma_async: the product is there at once, but its operands are being read until it is waited for."""
        self.whole_warps(i, 4)
        self.machine.counts[i, "mma"] += self.machine.blocks * (self.machine.threads // 128)
        left = a if isinstance(a, list) else self.tile(i, a, plan, "a")
        return multiply_warp_group(
            plan, (self.machine.blocks, self.machine.threads), old, left, self.tile(i, b, plan, "b"), scale
        )

    def tile(self, i: int, descriptor: Array, plan: NamedTuple, side: str) -> Array:
        """The numbers that a descriptor names: raw elements [blocks, warp groups, rows, columns]."""
        if len(descriptor) > 1 and (descriptor == descriptor[:1]).all():
            descriptor = descriptor[:1]
        key = (i, side, descriptor.tobytes()) if len(descriptor) == 1 else None
        kept = self.accesses.get(key) if key else None
        if kept is None:
            kept = read_descriptor(self.machine, i, descriptor, plan, side, self.size)
            if key and kept[3]:
                self.remember(key, kept)
        access, units, shape, _ = kept
        if self.history:
            self.history.begin_stream(i, access)
            self.open_streams.append(access)
        width = 32 // shape[-1]
        return self.take(width, units).reshape(self.machine.blocks, *shape)

    def wgmma_commit(self, i: int) -> None:
        """wgmma.commit_group."""
        self.streams.append(self.open_streams)
        self.open_streams = []

    def wgmma_wait(self, i: int, count: int) -> None:
        """wgmma.wait_group: all but the last `count` groups have read their operands."""
        while len(self.streams) > count:
            for access in self.streams.popleft():
                if self.history:
                    self.history.end_stream(access)

    # ---- barriers
    def barrier(self, i: int) -> None:
        """bar.sync of all threads of a block."""
        active = self.machine.active
        if active is not None:
            missing = active.any(1, keepdims=True) & ~active
            if missing.any():
                self.machine.fault(i, "barrier", "not every thread of the block reaches this barrier", missing)
        if self.history:
            self.history.next_time(("barrier", "converged"))
            self.machine.global_memory.barrier()

    def warp_barrier(self, i: int, member_mask: Array) -> None:
        """bar.warp.sync of the lanes of a mask."""
        lane = np.uint32(1) << (np.arange(self.machine.threads, dtype=np.uint32) % 32)[None]
        missing = (member_mask.astype(np.uint32) & lane) == 0
        if self.machine.active is not None:
            missing = missing & self.machine.active
        if missing.any():
            self.machine.fault(i, "barrier", "a thread is at a barrier of its warp whose mask leaves it out", missing)
        self.converge()

    def converge(self) -> None:
        """Order the threads of each warp, as instructions do that all of a warp execute together."""
        if self.history:
            self.history.next_time(("converged",))

    def whole_warps(self, i: int, warps: int = 1) -> None:
        """A fault, where some threads of a warp (or of so many) execute an instruction that is for all of them."""
        active = self.machine.active
        if active is None:
            return
        reached = np.logical_or.reduceat(active, np.arange(0, self.machine.threads, 32 * warps), axis=1)
        missing = reached.repeat(32 * warps, 1)[:, : self.machine.threads] & ~active
        if missing.any():
            text = f"not every thread of {'a warp' if warps == 1 else 'a warp group'} reaches this instruction"
            self.machine.fault(i, "barrier", text, missing)

    def proxy_fence(self, i: int) -> None:
        """fence.proxy.async."""
        if self.history:
            self.history.next_time(("fence",))
