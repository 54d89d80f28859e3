"""What a file of torch.save holds and where, found without running anything of it.

Such a file is a zip of `data.pkl`, a pickle, and of `data/KEY`, the bytes of a storage each, as they are. The pickle is
not unpickled: its steps are followed on a stack of plain values, and of the functions that it names only those are
known that put a tensor together.
"""

import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..files.reading import LoadError, require_file, shown
from .tensor_locations import DTYPES, Place, like, require_within

PICKLE_LIMIT = 1 << 23  # bytes; of a thousand tensors it has 150,000
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of before torch 1.6 begin
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
BROKEN = (zipfile.BadZipFile, NotImplementedError, struct.error, ArithmeticError, LookupError)
BROKEN += (TypeError, ValueError, AttributeError)


class MoreThanTensors(Exception):
    """A pickle does what no state dict needs."""


@dataclass(frozen=True)
class Name:
    """Something that a pickle names and that is not looked up, as "torch.FloatStorage"."""

    text: str


@dataclass(frozen=True)
class Stored:
    """A tensor of a pickle, as it says: numbers that are not checked yet."""

    storage: Any
    first: Any
    shape: Any
    stride: Any
    dtype: Name | None = None  # if the storage is untyped
    more: Any = None  # whether it is to be conjugated or negated


def torch_directory(file: Path) -> Iterator[tuple[str, Place]]:
    """Names and places of the tensors in a file. Errors: `LoadError` naming it, for whatever is wrong with it."""
    require_file(file)
    with file.open("rb") as opened:
        if opened.read(len(OLD)) == OLD:
            raise LoadError(f"{file} is in torch's format from before 1.6; load and save it again with a later torch")
        try:
            entries = Entries(opened)
            held, swapped = followed(entries.read("data.pkl", PICKLE_LIMIT)), entries.big_endian()
            if not isinstance(held, dict) or not all(
                isinstance(name, str) and isinstance(x, Stored | Name) for name, x in held.items()
            ):
                raise LoadError(f"{file} does not hold a state dict (names and their tensors); save that alone")
            places = [(name, placed(file, entries, name, x, swapped)) for name, x in held.items()]
        except LoadError:
            raise
        except MoreThanTensors as error:
            raise LoadError(
                f"{file} holds more than tensors. Python code in a checkpoint, here {shown(str(error))}, is never run: "
                "get it as safetensors, or save its state dict alone"
            ) from None
        except BROKEN as error:
            raise LoadError(f"{file} is not a whole file of torch.save: {error}. Get it again") from None
    yield from places


class Entries:
    """The entries of a zip that belong to torch.save: those beside its one data.pkl, whatever folder that is in."""

    def __init__(self, opened: BinaryIO):
        self.opened = opened
        self.length = opened.seek(0, 2)
        infos = zipfile.ZipFile(opened).infolist()
        self.infos = {info.filename: info for info in infos}
        pickles = [name for name in self.infos if f"/{name}".endswith("/data.pkl")]
        if len(self.infos) < len(infos):
            raise ValueError("an entry of the zip is there twice")
        if len(pickles) != 1:
            raise ValueError(f"the zip has {len(pickles)} data.pkl, expected one")
        self.prefix = pickles[0].removesuffix("data.pkl")

    def at(self, entry: str) -> tuple[int, int]:
        """The first byte of an entry and how many it has. Errors: ValueError if it is not stored as it is."""
        info = self.infos[self.prefix + entry]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename} is compressed or encrypted in it, and torch does neither")
        head = self.take(info.header_offset, 30)
        n, more = struct.unpack("<HH", head[26:])
        name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        start = info.header_offset + 30 + n + more
        after = self.take(start + info.file_size, 2)  # of this entry's sizes, of the next entry, or of the directory
        if (head[:4], self.take(info.header_offset + 30, n), after) != (b"PK\3\4", name, b"PK"):
            raise ValueError(f"{info.filename} is not where the directory of the zip says")
        return start, info.file_size

    def read(self, name: str, limit: int) -> bytes:
        start, size = self.at(name)
        if size > limit:
            raise ValueError(f"{name} has {size} bytes, expected at most {limit}")
        return self.take(start, size)

    def take(self, start: int, size: int) -> bytes:
        """So many bytes from there. Errors: ValueError if the file does not have them."""
        if not 0 <= start <= self.length - size:
            raise ValueError(f"it ends at byte {self.length}, but {size} from {start} on are wanted")
        self.opened.seek(start)
        return self.opened.read(size)

    def big_endian(self) -> bool:
        """Whether the highest byte of a number comes first; files of before torch 2.1 do not say, and it does not."""
        order = self.read("byteorder", 16) if f"{self.prefix}byteorder" in self.infos else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"its byte order is {order!r}, expected 'little' or 'big'")
        return order == b"big"


def followed(data: bytes) -> Any:
    """What the steps of a pickle put together. Errors: `MoreThanTensors`; LookupError, TypeError, ValueError."""
    steps: Iterator[Any] = pickletools.genops(data)
    stack: Any = []
    marks: list[int] = []  # how high the stack was
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = marks.pop()
        values = stack[at:]
        del stack[at:]
        return values

    for step, value, _ in steps:
        match step.name:
            case "PROTO" | "FRAME" | "STOP" | "BINPERSID":  # a storage is the tuple that tells which
                pass
            case name if name in VALUES:
                stack.append(value)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(step.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                last = stack.pop()
                stack[-1].append(last)
            case "APPENDS":
                values = to_mark()
                stack[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                pairs = to_mark() if step.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(isinstance(key, str | int) for key in pairs[::2]):
                    raise TypeError("a key is neither a name nor a number")
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(Name(value.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [Name(".".join(stack[-2:]))]
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(called(stack.pop(), arguments))
            case "BUILD":  # the attributes of a dictionary, as the versions of its modules
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise MoreThanTensors("an object with attributes")
            case other:
                raise MoreThanTensors(f"step {other} of a pickle")
    (result,) = stack
    return result


def called(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What a function of a pickle gives: a tensor, a dictionary, or the name of a kind of tensor that is not read."""
    match function:
        case Name("collections.OrderedDict") if not arguments:
            return {}
        case Name("torch.Size" | "torch.serialization._get_layout"):  # of a sparse tensor
            return arguments
        case Name("torch._utils._rebuild_tensor"):
            return Stored(*arguments)
        case Name("torch._utils._rebuild_tensor_v2"):  # between them: its gradient and what hooks it had
            return Stored(*arguments[:4], more=arguments[6:])
        case Name("torch._utils._rebuild_tensor_v3"):
            return Stored(*arguments[:4], dtype=arguments[6], more=arguments[7:])
        case Name("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        case Name(text) if text.startswith("torch._utils._rebuild_"):
            return function
    raise MoreThanTensors(function.text if isinstance(function, Name) else "no function")


def placed(file: Path, entries: Entries, name: str, x: Stored | Name, swapped: bool) -> Place:
    """Where a tensor lies. Errors: `LoadError` if it is of a kind that is not read; those of `BROKEN`."""
    what = f"{file}: {shown(name)[1:-1]}"
    if isinstance(x, Name) or (x.more and any(x.more)):
        kind = f"made by {shown(x.text)}" if isinstance(x, Name) else "a view that negates or conjugates"
        raise LoadError(f"{what} is {kind}; save it as a plain, dense tensor")
    _, kind, key, _, count = x.storage
    numbers = [count, x.first, *x.shape, *x.stride]
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(x.shape) != len(x.stride):
        raise ValueError(f"{name} has the shape {x.shape}, the strides {x.stride} and the offset {x.first}")
    dtype = STORAGES.get(kind.text.rpartition(".")[2])
    size = count * dtype.itemsize if dtype else 0
    if x.dtype is not None:
        dtype = next((known for known in DTYPES.values() if str(known) == x.dtype.text), None)
    if dtype is None:
        raise LoadError(f"{what} is {shown((x.dtype or kind).text)}; known are {', '.join(DTYPES)}")
    start, there = entries.at(f"data/{key}")
    if there != size:
        raise ValueError(f"the storage of {name} has {there} bytes, but {size} are announced")
    place = Place(file, start, size, like(what, dtype, x.shape, x.stride), x.first, swapped)
    require_within(what, place)
    return place
