"""The peak memory of tensors on any device, counted as they are made and freed."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Inside the `with`, counts the bytes of all tensors made there; each storage counts once. `existing` tensors from
    before do not count, nor do views of them.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.known_storages = {x.untyped_storage()._cdata for x in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and not x.is_meta and x.untyped_storage()._cdata not in self.known_storages:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known_storages.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known_storages.discard(key)
        self.live_bytes -= size
