"""The tensors of a checkpoint, by name, read when they are asked for.

Safetensors, whole or in shards; `pytorch_model.bin`, whole or in shards; one `.pt`. All of them hold plain bytes at
known places, so all are read alike: a file's directory first, then a tensor's own bytes through a private memory map.
"""

import math
import mmap
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import LoadError, parse_json, read_json, require_file
from .models.params import Lazy

DTYPES = {  # names in a safetensors header
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WHOLE = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `size` bytes from byte `start` of a file, and how its elements are found in them."""

    file: Path
    start: int
    size: int
    like: Tensor  # on the meta device: shape, strides, dtype
    first: int = 0  # element of the bytes that is the tensor's first


class Files:
    """Memory maps of files, made when first needed."""

    def __init__(self) -> None:
        self.maps: dict[Path, mmap.mmap] = {}

    def read(self, place: Place) -> Tensor:
        """A view of the file: nothing is copied."""
        like, count = place.like, place.size // place.like.itemsize
        if not count:
            return torch.empty_like(like, device="cpu")
        if place.file not in self.maps:
            with place.file.open("rb") as opened:
                self.maps[place.file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        held = self.maps[place.file]
        if place.start % like.itemsize:  # only as bytes can it be taken from there
            loose = torch.frombuffer(held, dtype=torch.uint8, count=place.size, offset=place.start)
            flat = loose.clone().view(like.dtype)
        else:
            flat = torch.frombuffer(held, dtype=like.dtype, count=count, offset=place.start)
        return flat.as_strided(like.shape, like.stride(), place.first)

    def forget(self, place: Place) -> None:
        """Give back the memory that reading took; a view is read again when it is touched again."""
        begin = -(-place.start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (place.start + place.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and place.file in self.maps:
            self.maps[place.file].madvise(mmap.MADV_DONTNEED, begin, end - begin)


def open_tensors(path: Path) -> Lazy:
    """The tensors of a folder or file, as views of what is on disk.

    Errors: `LoadError` naming the file and what to do about it, for everything that can be wrong with it.
    """
    places: dict[str, Place] = {}
    found, index = weight_files(path)
    for file in found:
        for name, place in directory(file):
            if name in places:
                raise LoadError(f"{name} is in {file} and in {places[name].file}; one of them must go")
            places[name] = place
    for name, file in index.items():
        if name not in places or places[name].file.name != file:
            raise LoadError(f"{path}: the index says that {name} is in {file}, but it is not; get {file} again")
    files = Files()
    return Lazy(
        {name: place.like for name, place in places.items()},
        lambda name: files.read(places[name]),
        lambda name: files.forget(places[name]),
    )


def weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder that hold its tensors, and which of them its index says each is in (if there is one).

    Safetensors come before .bin, as both hold the same. Errors: `LoadError` if there are none, or more than one answer.
    """
    if path.is_file():
        return [path], {}
    others = sorted(path.glob("*.pt"))
    for whole in WHOLE:
        index = path / f"{whole}.index.json"
        if others and (index.exists() or (path / whole).exists()):
            raise LoadError(f"{path} holds weights as {whole} and as {others[0].name}; move one of them elsewhere")
        if index.exists():
            return shards(index)
        if (path / whole).exists():
            return [path / whole], {}
    if len(others) == 1:
        return others, {}
    kinds = f"{', '.join(WHOLE)} (or an .index.json beside shards of them), or one .pt"
    if not others:
        strays = [file.name for file in sorted(path.glob("*-of-*")) if file.suffix in (".safetensors", ".bin")]
        more = f"; there is {strays[0]}, but no index that says what is in the shards" if strays else ""
        raise LoadError(f"{path}: weights do not exist there{more}. Expected {kinds}")
    raise LoadError(
        f"{path} holds {', '.join(file.name for file in others)}. Expected {kinds}; give the file's own path"
    )


def shards(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that an index names, and its map from tensors to their names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoadError(f"{index} has no weight_map from tensors to files")
    files = []
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if file.parent.resolve() != index.parent.resolve() or name in ("", ".", ".."):
            raise LoadError(f"{index} names {name!r}, which is not a file of its folder")
        if not file.is_file():
            raise LoadError(f"{file} does not exist, but {index.name} says that tensors are in it; get that shard")
        files.append(file)
    return files, weight_map


def directory(file: Path) -> Iterator[tuple[str, Place]]:
    """What a file holds and where. Errors: `LoadError` if it is not whole, or holds anything but tensors."""
    return safetensors_directory(file) if file.suffix == ".safetensors" else torch_directory(file)


def safetensors_directory(file: Path) -> Iterator[tuple[str, Place]]:
    require_file(file)
    try:
        with safe_open(file, framework="pt"):  # checks that header and file fit each other
            pass
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = parse_json(opened.read(size), f"{file}, its header,")
    except SafetensorError as error:
        raise LoadError(f"{file} is not a whole safetensors file: {error}. Get it again") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise LoadError(f"{file}: {name} is {entry['dtype']}; known are {', '.join(DTYPES)}")
        like = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
        start, end = entry["data_offsets"]
        yield name, Place(file, 8 + size + start, end - start, like)


def torch_directory(file: Path) -> Iterator[tuple[str, Place]]:
    """Fake tensors remember where in the file their bytes are; nothing but tensors is unpickled."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise LoadError(
            f"{file} holds more than tensors. Python code in a checkpoint is never run here: "
            "get it as safetensors, or save its state dict alone"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise LoadError(
            f"{file} is not a whole file of torch.save: {str(error).partition('. ')[0]}. Get it again"
        ) from None
    if not isinstance(held, dict) or not all(
        isinstance(x, Tensor) and isinstance(name, str) for name, x in held.items()
    ):
        raise LoadError(f"{file} does not hold a state dict (names and their tensors); save that alone")
    size = file.stat().st_size
    for name, x in held.items():
        storage = x.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None:
            raise LoadError(f"{file} is in torch's format from before 1.6; load and save it again with a later torch")
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        last = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
        end = start + storage.nbytes()
        if math.prod(x.shape) and ((last + 1) * x.itemsize > storage.nbytes() or end > size):
            raise LoadError(f"{file}: {name} lies beyond the end of the file. Get it again")
        yield name, Place(file, start, storage.nbytes(), like, x.storage_offset())
