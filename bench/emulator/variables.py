"""Variables that PTX declares outside of its kernel: in shared memory, and in global or constant memory with values."""

import re
import struct

import numpy as np

SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.[bsuf](\d+)\s+([\w$]+)(?:\[(\d*)\])?")
GLOBAL = re.compile(
    r"\.(?:global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.[bsuf](?P<bits>\d+)\s+(?P<name>[\w$]+)"
    r"(?P<count>\[\d+\])?(?:\s*=\s*(?P<values>\{[^}]*\}|[^;{]+))?\s*;"
)
ALIGNED = 128


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
