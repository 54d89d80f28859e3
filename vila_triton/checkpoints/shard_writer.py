"""Sharded safetensors written in place, a tensor at a time, in any order, so that no more than one is held.

The directory of every shard follows from names, shapes and dtypes alone and is written first. A shard takes its name
when it is whole; one that is cut off is `.part`, and is begun again. What is finished stands in a journal with its
checksum, and is kept when the same work is taken up again.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files.file_locks import LOCK, OtherWork, claim
from ..files.reading import read_json
from ..models.params import LoadError
from .tensor_files import WHOLE, weight_files
from .tensor_locations import DTYPES

SHARD_BYTES = 5 * 10**9
JOURNAL = ".shards.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Shard:
    """One file to be: its header, and the first byte of each tensor still missing from it."""

    file: Path
    header: bytes
    size: int
    starts: dict[str, int] = field(default_factory=dict)
    opened: BinaryIO | None = None


class Shards:
    """The tensors of a folder. `meta`: name -> a tensor of the shape and dtype to be written, on the meta device.

    `key`: what else the bytes depend on (the source, the seed); work begun under another key is refused.
    `missing`: the names still to be `put`; after the last, `close`. `progress` is called with bytes done and in all.
    """

    def __init__(
        self,
        folder: Path,
        meta: Mapping[str, Tensor],
        key: str = "",
        limit: int = SHARD_BYTES,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.folder, self.meta, self.progress = folder, meta, progress
        self.total = sum(x.nbytes for x in meta.values())
        shards = list(plan(folder, meta, limit))
        self.of = {name: shard for shard in shards for name in shard.starts}
        self.index = {name: shard.file.name for name, shard in self.of.items()} if len(shards) > 1 else None
        digest = hashlib.sha256(key.encode())
        for shard in shards:
            digest.update(shard.header)
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = {"key": digest.hexdigest(), "done": {}}
        if (folder / JOURNAL).exists():
            before = read_json(folder / JOURNAL)
            if before.get("key") != self.journal["key"]:
                raise OtherWork(f"{folder} holds the beginnings of other work; remove it, or write elsewhere")
            if not isinstance(before.get("done"), dict):
                raise LoadError(f"{folder / JOURNAL} does not say which shards are done; remove {folder}")
            self.journal["done"] = {
                shard.file.name: before["done"][shard.file.name] for shard in shards if whole(shard, before["done"])
            }
        write_json(folder / JOURNAL, self.journal)
        self.missing = {name for name in meta if self.of[name].file.name not in self.journal["done"]}
        if not meta:  # a file of no tensors is a file all the same
            self.finish(shards[0])

    def put(self, name: str, x: Tensor) -> None:
        """Write one tensor. Errors: ValueError if it is not the one announced; OSError naming the file."""
        like = self.meta[name]
        if name not in self.missing:
            raise ValueError(f"{name} has been written already")
        if x.shape != like.shape or x.dtype != like.dtype:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, but {like.dtype} {list(like.shape)} was announced")
        shard = self.of[name]
        opened = begun(shard)
        opened.seek(shard.starts.pop(name))
        left = memoryview(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore
        while len(left):
            left = left[opened.write(left) :]
        self.missing.discard(name)
        if not shard.starts:
            self.finish(shard)
        self.progress(self.total - sum(self.meta[other].nbytes for other in self.missing), self.total)

    def finish(self, shard: Shard) -> None:
        with begun(shard) as opened:
            os.fsync(opened.fileno())
        self.journal["done"][shard.file.name] = checksum(part(shard.file))
        part(shard.file).replace(shard.file)
        write_json(self.folder / JOURNAL, self.journal)

    def close(self) -> None:
        """Write the index, if there is more than one shard. Errors: ValueError if a tensor is missing."""
        if self.missing:
            raise ValueError(f"{len(self.missing)} tensors were not written, among them {min(self.missing)}")
        if self.index:
            index = {"metadata": {"total_size": self.total}, "weight_map": self.index}
            write_json(self.folder / f"{WHOLE[0]}.index.json", index)


def begun(shard: Shard) -> BinaryIO:
    """The file of a shard, with its header and as long as it will be."""
    if shard.opened is None:
        shard.opened = part(shard.file).open("wb", buffering=0)
        shard.opened.write(shard.header)
        shard.opened.truncate(shard.size)
    return shard.opened


def part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def whole(shard: Shard, done: Mapping[str, str]) -> bool:
    """Whether a shard is there as it was when it was finished."""
    return shard.file.name in done and shard.file.is_file() and checksum(shard.file) == done[shard.file.name]


def plan(folder: Path, meta: Mapping[str, Tensor], limit: int) -> Iterator[Shard]:
    """Cut tensors, in their order, into shards of at most `limit` bytes (a larger tensor is alone in its own)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, x in meta.items():
        if x.dtype not in NAMES:
            raise ValueError(f"{name} is {x.dtype}, which is not written; known are {', '.join(NAMES.values())}")
        if groups[-1] and size + x.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += x.nbytes
    for i, names in enumerate(groups, 1):
        names = sorted(names, key=lambda name: -meta[name].itemsize)  # so that every tensor is aligned
        at = f"-{i:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        shard = Shard(folder / f"model{at}.safetensors", b"", 0)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in names:
            x = meta[name]
            shard.starts[name], shard.size = shard.size, shard.size + x.nbytes
            offsets = [shard.starts[name], shard.size]
            header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        shard.header = struct.pack("<Q", len(text)) + text
        shard.size += len(shard.header)
        shard.starts = {name: start + len(shard.header) for name, start in shard.starts.items()}
        yield shard


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object; whoever reads the file meanwhile finds the old one or the new one."""
    part(path).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    part(path).replace(path)


@contextmanager
def building(target: Path, over: bool = False) -> Iterator[Path]:
    """A folder to write into, `target`.partial, which becomes `target` when the block ends well.

    Interrupted or out of space, it stays, and the next `building` of the same target goes on in it; `OtherWork` leaves
    it alone. After any other error nothing is left. `over`: begun afresh, left by no error, and files go into a target
    that may be there, in place of what weights it had; its own config.json is away meanwhile.
    Errors: ValueError if the target is there and not empty, or is a file; `OtherWork` if another process writes it.
    """
    folder = target.with_name(f"{target.name}.partial")
    require_free(target, over)
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder):
        require_free(target, over)  # whoever wrote it may just have finished
        yield from written(folder, target, over)


def require_free(target: Path, over: bool) -> None:
    """Errors: ValueError if something stands where a folder is to be written."""
    if not over and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty; give another folder, or remove it")
    if over and target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder, or the name of a new one")


def written(folder: Path, target: Path, over: bool) -> Iterator[Path]:
    """What `building` does once it is alone."""
    if over:
        empty(folder)
    kept = f"What was finished is in {folder}: the same command goes on from there"
    try:
        yield folder
    except BaseException as error:
        if over or not isinstance(error, OSError | KeyboardInterrupt | OtherWork):
            shutil.rmtree(folder)
        elif isinstance(error, OSError):
            raise OSError(f"{error}. {kept}") from error
        elif isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from None
        raise
    for journal in folder.rglob(JOURNAL):
        journal.unlink()
    if over and target.exists():
        move_into(folder, target)
    else:
        if target.exists():
            target.rmdir()
        folder.replace(target)
        (target / LOCK).unlink()  # which others still find held


def empty(folder: Path) -> None:
    """Remove what is in a folder that was begun, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def move_into(folder: Path, target: Path) -> None:
    """Move the files of a folder over those of another; weights that were there go, config.json comes last."""
    (target / "config.json").unlink(missing_ok=True)
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file() and file.name != LOCK)
    for place in {file.parent for file in files} - {Path()}:
        (target / place).mkdir(parents=True, exist_ok=True)
        old = {*(target / place).glob("model*.safetensors*"), *(target / place).glob("pytorch_model*.bin*")}
        with suppress(LoadError):
            old |= set(weight_files(target / place)[0])
        for file in old:
            file.unlink()
    for file in sorted(files, key=lambda file: file == Path("config.json")):
        (folder / file).replace(target / file)
    shutil.rmtree(folder)
