"""The tensors of a checkpoint by name, read when they are accessed.

They lie in safetensors, in `pytorch_model.bin`, both as one file or in shards, or in one `.pt`. All of these hold plain
bytes at known offsets and are read alike: first the directory of a file, then the bytes of a tensor through a private
memory map.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vila_triton.files.reading import LoadError, join_items, parse_json, read_json, require_file, short_repr
from vila_triton.models.params import LazyTensors

from .tensor_locations import SAFETENSORS_DTYPES, MappedFiles, TensorLocation, meta_tensor, require_within_file
from .torch_files import torch_locations

SINGLE_FILE_NAMES = ("model.safetensors", "pytorch_model.bin")


def open_tensors(path: Path) -> LazyTensors:
    """Open the tensors of a folder or file as views of what is on disk.

    Errors: `LoadError` naming the file and what to do about it, for everything that can be wrong with it.
    """
    locations: dict[str, TensorLocation] = {}
    paths, index = find_weight_files(path)
    for file in paths:
        for name, location in tensor_locations(file):
            if name in locations:
                raise LoadError(f"{name} is in {file} and in {locations[name].file}; one of them must go")
            locations[name] = location
    for name, file in index.items():
        if name not in locations or locations[name].file.name != file:
            raise LoadError(f"{path}: the index says that {name} is in {file}, but it is not; get {file} again")
    mapped_files = MappedFiles()
    return LazyTensors(
        {name: location.meta for name, location in locations.items()},
        lambda name: mapped_files.read(locations[name]),
        lambda name: mapped_files.release(locations[name]),
    )


def find_weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder that hold its tensors, and, if it has an index, the file of each tensor as the index says.

    Safetensors come before .bin, since both hold the same. Errors: `LoadError` if there are none, or several choices.
    """
    if path.is_file():
        return [path], {}
    pt_files = sorted(path.glob("*.pt"))
    for single_name in SINGLE_FILE_NAMES:
        index = path / f"{single_name}.index.json"
        if pt_files and (index.exists() or (path / single_name).exists()):
            both = f"{single_name} and as {pt_files[0].name}"
            raise LoadError(f"{path} holds weights as {both}; move one of them elsewhere")
        if index.exists():
            return read_index(index)
        if (path / single_name).exists():
            return [path / single_name], {}
    if len(pt_files) == 1:
        return pt_files, {}
    expected = f"{', '.join(SINGLE_FILE_NAMES)} (or an .index.json beside shards of them), or one .pt"
    if not pt_files:
        strays = [file.name for file in sorted(path.glob("*-of-*")) if file.suffix in (".safetensors", ".bin")]
        hint = f"; there is {strays[0]}, but no index that says what is in the shards" if strays else ""
        raise LoadError(f"{path}: weights do not exist there{hint}. Expected {expected}")
    names = join_items(file.name for file in pt_files)
    raise LoadError(f"{path} holds {names}. Expected {expected}; give the file's own path")


def read_index(index: Path) -> tuple[list[Path], dict[str, str]]:
    """Read an index: the files that it names, and its map from tensors to file names. Errors: `LoadError`."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoadError(f"{index} has no weight_map from tensors to files")
    files = []
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if file.name != name or len(name.encode()) > 255:
            raise LoadError(f"{index} names {short_repr(name)}, which is not a file of its folder")
        if not file.is_file():
            raise LoadError(f"{file} does not exist, but {index.name} says that tensors are in it; get that shard")
        files.append(file)
    return files, weight_map


def tensor_locations(file: Path) -> Iterator[tuple[str, TensorLocation]]:
    """List the tensors of a file and where they lie.

    Errors: `LoadError` if the file is damaged, or holds anything but tensors.
    """
    return safetensors_locations(file) if file.suffix == ".safetensors" else torch_locations(file)


def safetensors_locations(file: Path) -> Iterator[tuple[str, TensorLocation]]:
    """List the tensors of a safetensors file. Errors: `LoadError`."""
    require_file(file)
    try:
        with safe_open(file, framework="pt"):  # checks that header and file fit each other
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{file} is not a whole safetensors file: {str(error)[:200]}. Get it again") from None
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = parse_json(stream.read(size), f"{file}, its header,")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        label = f"{file}: {short_repr(name)[1:-1]}"
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise LoadError(f"{label} is {entry['dtype']}; known are {', '.join(SAFETENSORS_DTYPES)}")
        start, end = entry["data_offsets"]
        meta = meta_tensor(label, SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"])
        location = TensorLocation(file, 8 + size + start, end - start, meta)
        require_within_file(label, location)
        yield name, location
