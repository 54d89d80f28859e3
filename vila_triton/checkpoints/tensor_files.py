"""The tensors of a checkpoint, by name, read when they are asked for.

Safetensors, whole or in shards; `pytorch_model.bin`, whole or in shards; one `.pt`. All of them hold plain bytes at
known places, so all are read alike: a file's directory first, then a tensor's own bytes through a private memory map.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..files.reading import LoadError, listed, parse_json, read_json, require_file, shown
from ..models.params import Lazy
from .tensor_locations import DTYPES, Files, Place, like, require_within
from .torch_files import torch_directory

WHOLE = ("model.safetensors", "pytorch_model.bin")


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
    raise LoadError(f"{path} holds {listed(file.name for file in others)}. Expected {kinds}; give the file's own path")


def shards(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that an index names, and its map from tensors to their names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoadError(f"{index} has no weight_map from tensors to files")
    files = []
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if file.name != name or len(name.encode()) > 255:
            raise LoadError(f"{index} names {shown(name)}, which is not a file of its folder")
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
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{file} is not a whole safetensors file: {str(error)[:200]}. Get it again") from None
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = parse_json(opened.read(size), f"{file}, its header,")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        what = f"{file}: {shown(name)[1:-1]}"
        if entry["dtype"] not in DTYPES:
            raise LoadError(f"{what} is {entry['dtype']}; known are {', '.join(DTYPES)}")
        start, end = entry["data_offsets"]
        place = Place(file, 8 + size + start, end - start, like(what, DTYPES[entry["dtype"]], entry["shape"]))
        require_within(what, place)
        yield name, place
