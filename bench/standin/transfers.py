"""Pinned memory of the host, and copies to and from it that the host does not wait for.

Such a copy reads and writes the memory of the host when the device comes to it. So what is copied to the host is there
once the host has waited: until then integers are the smallest of their type, floating-point numbers NaN. And memory
that is copied to the device must not be written before that: the next wait finds it. Freed memory may be used again, as
torch's allocator of pinned memory waits for the copy.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .counts import count_wait

host_empty = torch.empty
pinned_storages: set[int] = set()
queued = [0]  # operators, launches and replays that the device was given
pending: list["Transfer"] = []


@dataclass(frozen=True)
class Transfer:
    """One copy that the device has not come to, queued at `position`; `finish` does what is left of it."""

    position: int
    finish: Callable[[], object]


def pin(x: Tensor) -> Tensor:
    """Notes that a new tensor of the CPU lies in pinned memory; returns it."""
    storage = x.untyped_storage()
    pinned_storages.add(storage._cdata)
    weakref.finalize(storage, pinned_storages.discard, storage._cdata)
    return x


def is_pinned(x: Tensor, device: Any = None) -> bool:
    """`Tensor.is_pinned`."""
    return x.untyped_storage()._cdata in pinned_storages


def pin_memory(x: Tensor, device: Any = None) -> Tensor:
    """`Tensor.pin_memory`: a copy of a CPU tensor in pinned memory, or the tensor itself if it lies there."""
    return x if is_pinned(x) else pin(x.clone())


def is_asynchronous(target: Tensor, source: Tensor, non_blocking: bool) -> bool:
    """Returns whether the host goes on before a copy between it and the device is done."""
    host = source if source.device.type == "cpu" else target
    return non_blocking and is_pinned(host)


def copy_to_host(target: Tensor, values: Tensor) -> None:
    """Queues a copy into pinned memory; `values` are those of the device, as a CPU tensor."""
    values = values.clone().to(target.dtype)
    target.fill_(float("nan") if target.is_floating_point() else torch.iinfo(target.dtype).min)
    pending.append(Transfer(queued[0], lambda: target.copy_(values)))


def copy_from_host(source: Tensor) -> None:
    """Queues a copy out of pinned memory, whose values the device has been given already."""
    storage, place = weakref.ref(source.untyped_storage()), (source.storage_offset(), source.shape, source.stride())
    dtype, values = source.dtype, source.clone()

    def check() -> None:
        if (memory := storage()) is not None and not host_empty(0, dtype=dtype).set_(memory, *place).equal(values):  # pyright: ignore
            raise RuntimeError("pinned memory was written while a copy of it to the device was under way")

    pending.append(Transfer(queued[0], check))


def finish_transfers(position: int | None = None) -> None:
    """Finishes the copies that were queued up to a position, all by default. Errors: RuntimeError, see
    `copy_from_host`.
    """
    done = [x for x in pending if position is None or x.position <= position]
    pending[:] = [x for x in pending if x not in done]
    for transfer in done:
        transfer.finish()


def wait_for(position: int) -> None:
    """Waits until the device has done what was queued up to a position. It counts as a wait of the host unless other
    work is queued behind: then the device does not run dry meanwhile.
    """
    count_wait("an event", overlapped=queued[0] > position)
    finish_transfers(position)
