"""Sharded safetensors written in place, a tensor at a time, in any order, so that no more than one is held.

The directory of every shard follows from names, shapes and dtypes alone and is written first. A shard takes its name
when it is whole; one that is cut off is `.part`, and is begun again. What is finished stands in a journal with its
checksum, and is kept when the same work is taken up again.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vila_triton.files.atomic import partial_path, write_json
from vila_triton.files.file_locks import FolderInUseError
from vila_triton.files.reading import LoadError, read_json

from .tensor_files import SINGLE_FILE_NAMES
from .tensor_locations import SAFETENSORS_DTYPES

MAX_SHARD_BYTES = 5 * 10**9
JOURNAL_NAME = ".shards.json"
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass
class Shard:
    """One file to be: its header, and the first byte of each tensor still missing from it."""

    file: Path
    header: bytes
    size: int
    offsets: dict[str, int] = field(default_factory=dict)
    stream: BinaryIO | None = None


class ShardWriter:
    """The tensors of a folder. `meta`: name -> a tensor of the shape and dtype to be written, on the meta device.

    `key`: what else the bytes depend on (the source, the seed); work begun under another key is refused.
    `missing`: the names still to be written with `write_tensor`; after the last, call `close`. `progress` is called
    with bytes done and in all.
    """

    def __init__(
        self,
        folder: Path,
        meta: Mapping[str, Tensor],
        key: str = "",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.folder, self.meta, self.progress = folder, meta, progress
        self.total_bytes = sum(x.nbytes for x in meta.values())
        shards = list(plan_shards(folder, meta, max_shard_bytes))
        self.shard_of = {name: shard for shard in shards for name in shard.offsets}
        self.weight_map = {name: shard.file.name for name, shard in self.shard_of.items()} if len(shards) > 1 else None
        digest = hashlib.sha256(key.encode())
        for shard in shards:
            digest.update(shard.header)
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = {"key": digest.hexdigest(), "done": {}}
        if (folder / JOURNAL_NAME).exists():
            previous = read_json(folder / JOURNAL_NAME)
            if previous.get("key") != self.journal["key"]:
                raise FolderInUseError.other_work(folder)
            if not isinstance(previous.get("done"), dict):
                raise LoadError(f"{folder / JOURNAL_NAME} does not say which shards are done; remove {folder}")
            self.journal["done"] = {
                shard.file.name: previous["done"][shard.file.name]
                for shard in shards
                if is_complete(shard, previous["done"])
            }
        write_json(folder / JOURNAL_NAME, self.journal)
        self.missing = {name for name in meta if self.shard_of[name].file.name not in self.journal["done"]}
        if not meta:  # a file of no tensors is a file all the same
            self.finish_shard(shards[0])

    def write_tensor(self, name: str, x: Tensor) -> None:
        """Write one tensor. Errors: ValueError if it is not the one announced; OSError naming the file."""
        expected = self.meta[name]
        if name not in self.missing:
            raise ValueError(f"{name} has been written already")
        if x.shape != expected.shape or x.dtype != expected.dtype:
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)}, but {expected.dtype} {list(expected.shape)} was announced"
            )
        shard = self.shard_of[name]
        stream = open_shard(shard)
        stream.seek(shard.offsets.pop(name))
        remaining = memoryview(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore
        while len(remaining):
            remaining = remaining[stream.write(remaining) :]
        self.missing.discard(name)
        if not shard.offsets:
            self.finish_shard(shard)
        self.progress(self.total_bytes - sum(self.meta[other].nbytes for other in self.missing), self.total_bytes)

    def finish_shard(self, shard: Shard) -> None:
        with open_shard(shard) as stream:
            os.fsync(stream.fileno())
        self.journal["done"][shard.file.name] = file_sha256(partial_path(shard.file))
        partial_path(shard.file).replace(shard.file)
        write_json(self.folder / JOURNAL_NAME, self.journal)

    def close(self) -> None:
        """Write the index, if there is more than one shard. Errors: ValueError if a tensor is missing."""
        if self.missing:
            raise ValueError(f"{len(self.missing)} tensors were not written, among them {min(self.missing)}")
        if self.weight_map:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
            write_json(self.folder / f"{SINGLE_FILE_NAMES[0]}.index.json", index)


def open_shard(shard: Shard) -> BinaryIO:
    """The file of a shard, with its header and as long as it will be."""
    if shard.stream is None:
        shard.stream = partial_path(shard.file).open("wb", buffering=0)
        shard.stream.write(shard.header)
        shard.stream.truncate(shard.size)
    return shard.stream


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_complete(shard: Shard, done: Mapping[str, str]) -> bool:
    """True if a shard is unchanged since it was finished."""
    return shard.file.name in done and shard.file.is_file() and file_sha256(shard.file) == done[shard.file.name]


def plan_shards(folder: Path, meta: Mapping[str, Tensor], max_shard_bytes: int) -> Iterator[Shard]:
    """Cut tensors, in their order, into shards of at most `max_shard_bytes` bytes; a larger one is alone in its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, x in meta.items():
        if x.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {x.dtype}, which is not written; known are {', '.join(DTYPE_NAMES.values())}")
        if groups[-1] and size + x.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += x.nbytes
    for i, names in enumerate(groups, 1):
        names = sorted(names, key=lambda name: -meta[name].itemsize)  # so that every tensor is aligned
        suffix = f"-{i:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        shard = Shard(folder / f"model{suffix}.safetensors", b"", 0)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in names:
            x = meta[name]
            shard.offsets[name], shard.size = shard.size, shard.size + x.nbytes
            offsets = [shard.offsets[name], shard.size]
            header[name] = {"dtype": DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        shard.header = struct.pack("<Q", len(text)) + text
        shard.size += len(shard.header)
        shard.offsets = {name: start + len(shard.header) for name, start in shard.offsets.items()}
        yield shard
