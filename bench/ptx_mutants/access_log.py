"""The log of what a run of the emulator accessed: shared memory as events, global memory as masks of requests."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

from ..correctness.guarded_memory import live_guards
from ..emulator.memory.global_memory import GlobalMemory
from ..emulator.memory.matrix_descriptors import read_descriptor
from ..emulator.memory.shared_memory import SharedMemory
from .separators import SEVERAL, Event, Kind

VERBS: dict[str, Kind] = {"reads": "read", "writes": "write", "copies": "copy"}
ORDERING: dict[str, Kind] = {  # methods of SharedMemory
    "barrier": "barrier",
    "warp_barrier": "warp barrier",
    "proxy_fence": "proxy fence",
    "commit_copies": "copies committed",
    "wait_copies": "copies awaited",
    "wgmma_commit": "products committed",
    "wgmma_wait": "products awaited",
}


@dataclass
class KernelLog:
    """The accesses of the launches of one kernel.

    events      in shared memory, in order
    num_blocks  of the grid
    num_bytes   of shared memory
    masks       of global memory and of cp.async: a hash over the masks of all requests
    stores      to global memory: a hash over their masks and values
    strays      requests to what is no element of a guarded tensor
    """

    events: list[Event] = field(default_factory=list)
    num_blocks: int = 0
    num_bytes: int = 0
    masks: Any = field(default_factory=hashlib.sha256)
    stores: Any = field(default_factory=hashlib.sha256)
    strays: int = 0

    def add(self, kind: Kind, instruction: int, machine: Any, **fields: Any) -> None:
        blocks = np.asarray(machine.block_ids)
        self.num_blocks = max(self.num_blocks, int(blocks.max()) + 1)
        self.events.append(Event(kind, instruction, blocks, **fields))

    def add_request(
        self, instruction: int, machine: Any, address: np.ndarray, mask: np.ndarray | None, size: int, values: Any = ()
    ) -> None:
        """Notes which threads take part in a request, the values that they store, and whether it strays."""
        shape = (machine.blocks, machine.threads)
        taking_part = np.ones(shape, bool)
        for some in (mask, machine.active):
            taking_part &= True if some is None else some
        request = f"{instruction} {shape} ".encode() + np.packbits(taking_part).tobytes()
        self.masks.update(request)
        if values:
            stored = [np.broadcast_to(x, shape)[taking_part].tobytes() for x in values]
            self.stores.update(b"".join((request, *stored)))
        addresses = np.broadcast_to(address, shape)[taking_part]
        self.strays += not (are_elements(addresses) and are_elements(addresses + np.uint64(size - 1)))


def are_elements(addresses: np.ndarray) -> bool:
    """True if all addresses are those of elements of guarded tensors."""
    known = np.zeros(addresses.shape, bool)
    for guard in live_guards.values():
        start = guard.buffer.data_ptr()
        inside = (addresses >= start) & (addresses < start + guard.buffer.nbytes)
        if guard.reads_outside(addresses[inside]):
            return False
        known |= inside
    return bool(known.all())


def bytes_of(access: Any, machine: Any) -> dict[str, Any]:
    """The bytes of an access, thread by thread, as the fields of an `Event`."""
    shape = (machine.blocks, machine.threads)
    mask = np.ones(shape, bool) if access.mask is None else np.broadcast_to(access.mask, shape)
    row, thread = np.nonzero(mask)
    first = np.broadcast_to(access.address, shape)[mask]
    byte = (first[:, None] + np.arange(access.size)).ravel()
    row, thread = np.repeat(row, access.size), np.repeat(thread, access.size)
    return {"row": row, "byte": byte, "thread": thread, "warp": thread // 32}


@contextmanager
def logged_accesses() -> Iterator[dict[str, KernelLog]]:
    """Inside, what each kernel accesses is logged, by the name of the kernel; each is to be launched once."""
    logs: dict[str, KernelLog] = defaultdict(KernelLog)
    methods = {
        name: getattr(SharedMemory, name) for name in ("access", "load_matrix", "store_matrix", "tile", *ORDERING)
    }
    global_methods = {name: getattr(GlobalMemory, name) for name in ("load", "store", "copy")}
    by_warp = [False]  # the access under way is by whole warps, as that of ldmatrix

    def log_of(memory: Any) -> KernelLog:
        return logs[memory.machine.program.kernel.name]

    def access(self: Any, i: int, address: np.ndarray, mask: np.ndarray | None, size: int, verb: str) -> Any:
        result = methods["access"](self, i, address, mask, size, verb)
        accessed = bytes_of(result, self.machine)
        if by_warp[0]:
            accessed["thread"] = np.full_like(accessed["thread"], SEVERAL)
        log = log_of(self)
        log.num_bytes = max(log.num_bytes, self.bytes.shape[1])
        log.add(VERBS[verb], i, self.machine, **accessed)
        return result

    def whole_warps(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            by_warp[0] = True
            try:
                return methods[name](self, *args)
            finally:
                by_warp[0] = False

        return call

    def tile(self: Any, i: int, descriptor: np.ndarray, plan: Any, side: str) -> Any:
        operand = read_descriptor(self.machine, i, descriptor, plan, side, self.size)[0]
        first = np.broadcast_to(operand.address, (self.machine.blocks, operand.address.shape[1]))
        byte = (first[:, :, None] + np.arange(operand.size)).reshape(len(first), -1)
        row = np.repeat(np.arange(len(byte)), byte.shape[1])
        several = np.full(byte.size, SEVERAL)
        log = log_of(self)
        log.add("tensor core read", i, self.machine, row=row, byte=byte.ravel(), thread=several, warp=several)
        return methods["tile"](self, i, descriptor, plan, side)

    def ordering(name: str, kind: Kind) -> Callable[..., Any]:
        def call(self: Any, i: int, *args: Any) -> Any:
            pending = int(args[0]) if name in ("wait_copies", "wgmma_wait") else 0
            log_of(self).add(kind, i, self.machine, pending=pending)
            return methods[name](self, i, *args)

        return call

    def request(name: str) -> Callable[..., Any]:
        def call(self: Any, i: int, address: np.ndarray, mask: np.ndarray | None, width: int, *args: Any) -> Any:
            values = args[0] if name == "store" else ()
            size = width * (len(values) or args[0])
            log_of(self).add_request(i, self.machine, address, mask, size, values)
            return global_methods[name](self, i, address, mask, width, *args)

        return call

    replacements = {
        "access": access,
        "tile": tile,
        **{name: whole_warps(name) for name in ("load_matrix", "store_matrix")},
        **{name: ordering(name, kind) for name, kind in ORDERING.items()},
    }
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(patch.object(SharedMemory, name, replacement))
        for name in global_methods:
            stack.enter_context(patch.object(GlobalMemory, name, request(name)))
        yield logs
