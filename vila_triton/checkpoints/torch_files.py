"""List the tensors of a file of torch.save without running anything from it.

Such a file is a zip of `data.pkl`, a pickle, and of `data/KEY`, the plain bytes of a storage each. The pickle is not
unpickled: its opcodes are interpreted on a stack of plain values, and of the functions that it names only those are
known that rebuild a tensor.
"""

import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vila_triton.files.reading import LoadError, require_file, short_repr

from .tensor_locations import SAFETENSORS_DTYPES, TensorLocation, meta_tensor, require_within_file

MAX_PICKLE_BYTES = 1 << 23  # bytes; of a thousand tensors it has 150,000
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of before torch 1.6 begin
STORAGE_DTYPES = {
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
LITERAL_OPCODES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
CONSTANT_OPCODES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
PARSE_ERRORS = (zipfile.BadZipFile, NotImplementedError, struct.error, ArithmeticError, LookupError)
PARSE_ERRORS += (TypeError, ValueError, AttributeError)


class UnsafePickleError(Exception):
    """A pickle does something that no state dict needs."""


@dataclass(frozen=True)
class PickleGlobal:
    """A function or class that a pickle names, such as "torch.FloatStorage". It is never looked up."""

    qualified_name: str


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as a pickle describes it, with numbers that are not checked yet."""

    storage: Any
    storage_offset: Any
    shape: Any
    stride: Any
    dtype: PickleGlobal | None = None  # if the storage is untyped
    view_flags: Any = None  # whether it is to be conjugated or negated


def torch_locations(file: Path) -> Iterator[tuple[str, TensorLocation]]:
    """List the tensors of a file of torch.save and where they lie. Errors: `LoadError`."""
    require_file(file)
    with file.open("rb") as stream:
        if stream.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            raise LoadError(f"{file} is in torch's format from before 1.6; load and save it again with a later torch")
        try:
            entries = ZipEntries(stream)
            state_dict = interpret_pickle(entries.read("data.pkl", MAX_PICKLE_BYTES))
            big_endian = entries.is_big_endian()
            if not is_state_dict(state_dict):
                raise LoadError(f"{file} does not hold a state dict (names and their tensors); save that alone")
            locations = [(name, locate_tensor(file, entries, name, x, big_endian)) for name, x in state_dict.items()]
        except LoadError:
            raise
        except UnsafePickleError as error:
            code = f"Python code in a checkpoint, here {short_repr(str(error))}, is never run"
            advice = "get it as safetensors, or save its state dict alone"
            raise LoadError(f"{file} holds more than tensors. {code}: {advice}") from None
        except PARSE_ERRORS as error:
            raise LoadError(f"{file} is not a whole file of torch.save: {error}. Get it again") from None
    yield from locations


def is_state_dict(value: Any) -> bool:
    """True if a value of a pickle is a dictionary of names and tensors."""
    tensors = (PickledTensor, PickleGlobal)
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(x, tensors) for k, x in value.items())


class ZipEntries:
    """The entries of a zip that torch.save wrote: its one data.pkl and all beside it, whatever folder that is in.

    Errors: ValueError if there is not one data.pkl, or an entry twice.
    """

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.file_size = stream.seek(0, 2)
        infos = zipfile.ZipFile(stream).infolist()
        self.infos = {info.filename: info for info in infos}
        pickles = [name for name in self.infos if f"/{name}".endswith("/data.pkl")]
        if len(self.infos) < len(infos):
            raise ValueError("an entry of the zip is there twice")
        if len(pickles) != 1:
            raise ValueError(f"the zip has {len(pickles)} data.pkl, expected one")
        self.prefix = pickles[0].removesuffix("data.pkl")

    def locate(self, entry: str) -> tuple[int, int]:
        """The first byte of an entry and its size. Errors: ValueError if it is compressed, or the directory wrong."""
        info = self.infos[self.prefix + entry]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename} is compressed or encrypted in it, and torch does neither")
        local_header = self.read_range(info.header_offset, 30)
        name_length, extra_length = struct.unpack("<HH", local_header[26:])
        name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        start = info.header_offset + 30 + name_length + extra_length
        local_name = self.read_range(info.header_offset + 30, name_length)
        next_signature = self.read_range(start + info.file_size, 2)  # of its sizes, the next entry or the directory
        if (local_header[:4], local_name, next_signature) != (b"PK\3\4", name, b"PK"):
            raise ValueError(f"{info.filename} is not where the directory of the zip says")
        return start, info.file_size

    def read(self, name: str, max_bytes: int) -> bytes:
        """Read an entry. Errors: ValueError if it has more than max_bytes."""
        start, size = self.locate(name)
        if size > max_bytes:
            raise ValueError(f"{name} has {size} bytes, expected at most {max_bytes}")
        return self.read_range(start, size)

    def read_range(self, start: int, size: int) -> bytes:
        """Read size bytes from start on. Errors: ValueError if the file does not have them."""
        if not 0 <= start <= self.file_size - size:
            raise ValueError(f"it ends at byte {self.file_size}, but {size} from {start} on are wanted")
        self.stream.seek(start)
        return self.stream.read(size)

    def is_big_endian(self) -> bool:
        """True if numbers have their highest byte first. Files from before torch 2.1 do not say so and have not."""
        byte_order = self.read("byteorder", 16) if f"{self.prefix}byteorder" in self.infos else b"little"
        if byte_order not in (b"little", b"big"):
            raise ValueError(f"its byte order is {byte_order!r}, expected 'little' or 'big'")
        return byte_order == b"big"


def interpret_pickle(data: bytes) -> Any:
    """Interpret the opcodes of a pickle and return the value that they build.

    Errors: `UnsafePickleError`; LookupError, TypeError or ValueError for a damaged pickle.
    """
    opcodes: Iterator[Any] = pickletools.genops(data)
    stack: Any = []
    marks: list[int] = []  # how high the stack was
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for opcode, value, _ in opcodes:
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP" | "BINPERSID":  # a storage is the tuple that tells which
                pass
            case name if name in LITERAL_OPCODES:
                stack.append(value)
            case name if name in CONSTANT_OPCODES:
                stack.append(CONSTANT_OPCODES[name])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                last = stack.pop()
                stack[-1].append(last)
            case "APPENDS":
                values = pop_to_mark()
                stack[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                pairs = pop_to_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
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
                stack.append(PickleGlobal(value.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [PickleGlobal(".".join(stack[-2:]))]
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(call_global(stack.pop(), arguments))
            case "BUILD":  # the attributes of a dictionary, as the versions of its modules
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise UnsafePickleError("an object with attributes")
            case other:
                raise UnsafePickleError(f"step {other} of a pickle")
    (result,) = stack
    return result


def call_global(function: Any, arguments: tuple[Any, ...]) -> Any:
    """The result of a function that a pickle calls: a tensor or a dictionary, or the name of a function for tensors of
    a kind that is not read. Errors: `UnsafePickleError` for all others.
    """
    match function:
        case PickleGlobal("collections.OrderedDict") if not arguments:
            return {}
        case PickleGlobal("torch.Size" | "torch.serialization._get_layout"):  # of a sparse tensor
            return arguments
        case PickleGlobal("torch._utils._rebuild_tensor"):
            return PickledTensor(*arguments)
        case PickleGlobal("torch._utils._rebuild_tensor_v2"):  # between them: its gradient and what hooks it had
            return PickledTensor(*arguments[:4], view_flags=arguments[6:])
        case PickleGlobal("torch._utils._rebuild_tensor_v3"):
            return PickledTensor(*arguments[:4], dtype=arguments[6], view_flags=arguments[7:])
        case PickleGlobal("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        case PickleGlobal(text) if text.startswith("torch._utils._rebuild_"):
            return function
    raise UnsafePickleError(function.qualified_name if isinstance(function, PickleGlobal) else "no function")


def locate_tensor(
    file: Path, entries: ZipEntries, name: str, x: PickledTensor | PickleGlobal, big_endian: bool
) -> TensorLocation:
    """Where a tensor of a pickle lies. Errors: `LoadError` for kinds that are not read; those of `PARSE_ERRORS`."""
    label = f"{file}: {short_repr(name)[1:-1]}"
    if isinstance(x, PickleGlobal):
        raise LoadError(f"{label} is made by {short_repr(x.qualified_name)}; save it as a plain, dense tensor")
    if x.view_flags and any(x.view_flags):
        raise LoadError(f"{label} is a view that negates or conjugates; save it as a plain, dense tensor")
    _, storage_type, key, _, count = x.storage
    numbers = [count, x.storage_offset, *x.shape, *x.stride]
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(x.shape) != len(x.stride):
        raise ValueError(f"{name} has the shape {x.shape}, the strides {x.stride} and the offset {x.storage_offset}")
    dtype = STORAGE_DTYPES.get(storage_type.qualified_name.rpartition(".")[2])
    size = count * dtype.itemsize if dtype else 0
    if x.dtype is not None:
        dtype = {str(dtype): dtype for dtype in SAFETENSORS_DTYPES.values()}.get(x.dtype.qualified_name)
    if dtype is None:
        name_in_file = short_repr((x.dtype or storage_type).qualified_name)
        raise LoadError(f"{label} is {name_in_file}; known are {', '.join(SAFETENSORS_DTYPES)}")
    start, stored_bytes = entries.locate(f"data/{key}")
    if stored_bytes != size:
        raise ValueError(f"the storage of {name} has {stored_bytes} bytes, but {size} are announced")
    meta = meta_tensor(label, dtype, x.shape, x.stride)
    location = TensorLocation(file, start, size, meta, x.storage_offset, big_endian)
    require_within_file(label, location)
    return location
