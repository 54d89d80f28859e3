"""Declarations outside of the body of a kernel: parameters, variables with their values, functions, files."""

import re
import struct
from dataclasses import dataclass

import numpy as np

SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.[bsuf](\d+)\s+([\w$]+)(?:\[(\d*)\])?")
GLOBAL = re.compile(
    r"\.(?:global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.[bsuf](?P<bits>\d+)\s+(?P<name>[\w$]+)"
    r"(?P<count>\[\d+\])?(?:\s*=\s*(?P<values>\{[^}]*\}|[^;{]+))?\s*;"
)
FUNCTION = re.compile(r"\.func\s*(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*(?:\((?P<params>[^)]*)\))?[^;{]*?\{")
ALIGNED = 128


class UnknownPTX(NotImplementedError):
    """PTX that the emulator does not know: which instruction, of which kernel, from which line."""


def source_files(text: str) -> dict[str, str]:
    """The files of source lines, by their numbers."""
    return dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))


def parameters(text: str) -> list[tuple[str, str]]:
    """(name, type) of a list of parameters, arrays as "b8[128]"."""
    params = []
    for declaration in filter(str.strip, text.split(",")):
        found = re.search(r"\.([bsuf]\d+)\b.*?([\w$]+)(\[\d+\])?\s*$", " ".join(declaration.split()))
        if not found:
            raise UnknownPTX(f"parameter {declaration.strip()}")
        params.append((found[2], found[1] + (found[3] or "")))
    return params


@dataclass(frozen=True)
class Function:
    """A function that a kernel calls: the names of its parameters and of its result, and the text of its body."""

    params: tuple[str, ...]
    results: tuple[str, ...]
    body: str


def functions(text: str) -> dict[str, Function]:
    """The functions of a text that have a body."""
    found = {}
    for heading in FUNCTION.finditer(text):
        results, params = (tuple(name for name, _ in parameters(heading[part] or "")) for part in ("results", "params"))
        depth, end = 1, heading.end()
        while depth and end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        found[heading["name"]] = Function(params, results, text[heading.end() : end - 1])
    return found


def number_bits(text: str) -> int:
    """A number of PTX as an integer: of `0f…` and of a decimal fraction float32's bits, of `0d…` those of float64."""
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    if "." in text:
        return struct.unpack("<I", struct.pack("<f", float(text)))[0]
    digits = text.rstrip("U")
    return int(digits, 8 if re.fullmatch(r"-?0[0-7]+", digits) else 0)


def shared_variables(text: str) -> dict[str, int]:
    """Variables in shared memory and their addresses; those that a launch gives a size lie together at the end."""
    symbols, end, open_ended = {}, 0, []
    for extern, align, bits, name, count in SHARED.findall(text):
        if extern or not count:
            open_ended.append(name)
            continue
        end = -(-end // int(align)) * int(align)
        symbols[name] = end
        end += int(count) * int(bits) // 8
    return symbols | dict.fromkeys(open_ended, -(-end // 16) * 16)


def global_variables(text: str) -> dict[str, bytes]:
    """Variables in global or constant memory and their bytes; those with the addresses of others are left out."""
    variables = {}
    for found in GLOBAL.finditer(text):
        size = int(found["bits"]) // 8
        values = [value.strip() for value in (found["values"] or "").strip("{} \n").split(",") if value.strip()]
        if not all(re.fullmatch(r"-?(0[xXfFdD][0-9a-fA-F]+|\d+(\.\d+)?U?)", value) for value in values):
            continue
        numbers = [number_bits(value) & (2 ** (8 * size) - 1) for value in values]
        count = int(found["count"].strip("[]")) if found["count"] else 1
        data = b"".join(number.to_bytes(size, "little") for number in numbers)
        variables[found["name"]] = data.ljust(count * size, b"\0")
    return variables


def place_variables(variables: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Memory for global variables, with their values."""
    placed = {}
    for name, data in variables.items():
        room = np.zeros(-(-len(data) // ALIGNED) * ALIGNED + ALIGNED, np.uint8)
        start = -room.ctypes.data % ALIGNED
        placed[name] = room[start : start + len(data)]
        placed[name][:] = np.frombuffer(data, np.uint8)
    return placed
