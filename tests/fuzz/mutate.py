"""Ways to damage a file: flipped bits and cut ends for any file, and damage that keeps to a format.

Every function takes a `Random` and the bytes of a whole file, and returns those of a damaged one: the same random
numbers give the same bytes.
"""

import io
import json
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

Mutate = Callable[[Random, bytes], bytes]

EDGES = (0, 1, 2, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def of_bytes(rng: Random, whole: bytes) -> bytes:
    """Up to eight small damages anywhere, or near the beginning, where headers are."""
    x = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        i = rng.randrange(min(len(x), rng.choice((16, 64, 10**9))) or 1)
        kind = rng.choice(("flip", "set", "number", "insert", "drop", "twice", "zeros", "cut", "splice"))
        length = min(rng.choice((1, 2, 4, 8, 64, 1000)), len(x) - i)
        if not x or kind == "insert":
            x[i:i] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif kind == "flip":
            x[i] ^= 1 << rng.randrange(8)
        elif kind == "set":
            x[i] = rng.choice((0, 1, 10, 34, 44, 58, 91, 123, 127, 128, 255))
        elif kind == "number":
            width = rng.choice((2, 4, 8))
            number = rng.choice(EDGES) % 256**width
            x[i : i + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif kind == "drop":
            del x[i : i + length]
        elif kind == "twice":
            x[i:i] = x[i : i + length]
        elif kind == "zeros":
            x[i : i + length] = bytes(length)
        elif kind == "cut":
            del x[i:]
        else:
            j = rng.randrange(len(whole))
            x[i : i + length] = whole[j : j + length]
    return bytes(x)


RAW = {  # text that json.dumps does not write, by the word that stands for it until then
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@huge@": "9" * 400,
    "@endless@": "1" * 10_000,
    "@overflow@": "1e999",
    "@surrogate@": '"\\ud800"',
    "@zero byte@": '"a\\u0000b"',
    "@nested@": "[" * 100_000 + "]" * 100_000,
    "@nested objects@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@many@": "[" + "0," * 200_000 + "0]",
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 10**7, 10**9, 2**31, 2**63, 2**64, -(2**63), 0.5, -0.5, 1e-320, 1e300),
    *("", "x", "0", "1", "None", "../..", "/etc/passwd", "a" * 5000, "é\u2028\U0001f600", "{", "<image>"),
    *([], {}, [[]], [None], [1, 2], ["x"], {"a": 1}, [{"a": []}], {"": None}),
    *RAW,
)


def of_json(rng: Random, whole: bytes) -> bytes:
    """Other values, keys that are missing or there twice, other encodings; or damaged text."""
    if rng.random() < 0.2:
        return of_bytes(rng, whole)
    try:
        document = json.loads(whole)
    except ValueError:
        return of_bytes(rng, whole)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        document = changed(rng, document)
    return encoded(rng, written(rng, document))


def value(rng: Random) -> Any:
    return deepcopy(rng.choice(VALUES))


def changed(rng: Random, document: Any) -> Any:
    """A tree with one of its slots changed."""
    slots: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        node = stack.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in pairs:
            slots.append((node, key))
            stack.append(child)
    if not slots or rng.random() < 0.03:
        return value(rng)
    node, key = rng.choice(slots)
    kind = rng.choice(("value", "value", "value", "kind", "drop", "rename", "swap", "insert", "code"))
    if kind == "value":
        node[key] = value(rng)
    elif kind == "kind":
        node[key] = other_kind(rng, node[key])
    elif kind == "drop":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[rng.choice(("", "x", "\x00", key + key, key.upper()))] = node.pop(key)
    elif kind == "swap":
        other, other_index = rng.choice(slots)
        if other_index in other if isinstance(other, dict) else other_index < len(other):
            node[key] = deepcopy(other[other_index])
    elif kind == "insert":
        if isinstance(node, list):
            node.insert(key, value(rng))
        else:
            node[rng.choice(("x", "type", "size"))] = value(rng)
    elif kind == "code" and isinstance(document, dict):
        named = rng.choice(
            ("AutoTokenizer", "AutoImageProcessor", "AutoConfig", "AutoProcessor", "AutoModelForCausalLM")
        )
        document["auto_map"] = {
            named: rng.choice(("planted.Planted", ["planted.Planted", None], "other/place--planted.Planted"))
        }
        document.setdefault("trust_remote_code", True)
    return document


def other_kind(rng: Random, x: Any) -> Any:
    """The value as another type would hold it, or near it."""
    if isinstance(x, bool) or x is None:
        return str(x)
    if isinstance(x, int | float):
        return rng.choice((str(x), -x, x + 1, x // 2, x * 1000, [x])) if abs(x) < 1e300 else str(x)
    if isinstance(x, str):
        return rng.choice(([x], {x: x}, x + "x", x[:-1], x.upper(), len(x)))
    if isinstance(x, list):
        return rng.choice((dict(enumerate(x)), deepcopy(x) + x, x[:-1], [x], json.dumps(x)))
    return rng.choice(([*x.items()], [*x], [x], json.dumps(x)))


def written(rng: Random, document: Any) -> str:
    """JSON, sometimes with a repeated key."""
    text = json.dumps(document, indent=rng.choice((None, 2)))
    for word, raw in RAW.items():
        text = text.replace(json.dumps(word), raw)
    if rng.random() < 0.05 and text.startswith("{") and isinstance(document, dict) and document:
        key = rng.choice(list(document))
        text = f"{{{json.dumps(key)}: {rng.choice(('1', 'null', '[]'))}, {text[1:]}"
    return text


def encoded(rng: Random, text: str) -> bytes:
    """UTF-8, sometimes another encoding, or with invalid bytes."""
    kind = rng.choice(("utf-8",) * 20 + ("utf-16", "utf-8-sig", "latin", "broken"))
    if kind == "latin":
        return text.replace("e", "é").encode("latin-1", "replace")
    if kind == "broken":
        x = bytearray(text.encode())
        i = rng.randrange(len(x) + 1)
        x[i:i] = rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00"))
        return bytes(x)
    return text.encode(kind)


def of_lines(rng: Random, whole: bytes) -> bytes:
    """One JSON object a line: a line changed, missing, there twice, or any damage at all."""
    if rng.random() < 0.3:
        return of_bytes(rng, whole)
    lines = whole.splitlines()
    i = rng.randrange(len(lines))
    kind = rng.choice(("change", "change", "change", "drop", "twice", "move", "other"))
    if kind == "change":
        lines[i] = of_json(rng, lines[i])
    elif kind == "drop":
        del lines[i]
    elif kind == "twice":
        lines.insert(rng.randrange(len(lines)), lines[i])
    elif kind == "move":
        lines.insert(rng.randrange(len(lines)), lines.pop(i))
    else:
        lines.insert(i, encoded(rng, written(rng, value(rng))))
    return b"\n".join(lines) + rng.choice((b"\n", b"\n", b""))


def of_text(rng: Random, whole: bytes) -> bytes:
    """Text with damage, or with characters that few expect."""
    if rng.random() < 0.6:
        return of_bytes(rng, whole)
    text = whole.decode()
    i = rng.randrange(len(text))
    odd = ("\ud800", "\x00", "\u2028", "\x85", "\x1c", "\r", "\ufeff", "<image>", "</s>", "e\u0301" * 99, "x" * 300_000)
    return (text[:i] + rng.choice(odd) + text[i:]).encode("utf-8", "surrogatepass")


def of_safetensors(rng: Random, whole: bytes) -> bytes:
    """A header with other dtypes, shapes and offsets, its length right or wrong; or damaged bytes."""
    if rng.random() < 0.3 or len(whole) < 8:
        return of_bytes(rng, whole)
    (size,) = struct.unpack_from("<Q", whole)
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        entry = header[rng.choice(list(header))]
        kind = rng.choice(("dtype", "shape", "offsets", "any", "any", "about", "text"))
        if kind == "any" or not isinstance(entry, dict):
            header = changed(rng, header)
        elif kind == "dtype" and "dtype" in entry:
            entry["dtype"] = rng.choice(("F64", "F8_E4M3", "F4", "BOOL", "U16", "C64", "I64", "F16", "U8", "", None, 3))
        elif kind == "shape" and isinstance(entry.get("shape"), list):
            entry["shape"].insert(rng.randrange(len(entry["shape"]) + 1), rng.choice((0, 1, -1, 2, *EDGES)))
        elif kind == "offsets" and isinstance(entry.get("data_offsets"), list) and entry["data_offsets"]:
            i = rng.randrange(len(entry["data_offsets"]))
            entry["data_offsets"][i] = rng.choice((*EDGES, -1, entry["data_offsets"][i - 1], len(data)))
        elif kind == "about":
            header["__metadata__"] = rng.choice(({}, {"format": 1}, {"format": None}, [], "x", {"a": "@surrogate@"}))
        elif kind == "text" and (about := header.get("__metadata__")) and isinstance(about, dict):
            name = rng.choice(list(about))
            text = about[name] if isinstance(about[name], str) else "{}"
            about[name] = of_json(rng, text.encode() or b"{}").decode(errors="replace")
        if not isinstance(header, dict) or not header:
            break
    text = encoded(rng, written(rng, header))
    length = len(text) if rng.random() < 0.9 else rng.choice((0, len(text) - 1, len(text) + 1, *EDGES))
    return struct.pack("<Q", length % 2**64) + text + data


PICKLES = (  # each would make the file "planted" in the current folder
    b"cposix\nsystem\n(S'touch planted'\ntR.",
    b'cbuiltins\nexec\n(S\'open("planted", "w")\'\ntR.',
    b"\x80\x02cbuiltins\nopen\n(X\x07\x00\x00\x00plantedX\x01\x00\x00\x00wtR.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0dtouch planted\x85R.",
    b"ctorch\nsave\n(S'x'\nS'planted'\ntR.",
    b"cpathlib\nPosixPath\n(S'planted'\ntR(dS'x'\ncpathlib\nPath.touch\ns.",
    b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.",
)


def of_torch(rng: Random, whole: bytes) -> bytes:
    """A file of torch.save as a zip that another tool wrote, with other numbers in its pickle, with code in it."""
    kind = rng.choice(("bytes", "pickle", "pickle", "pickle", "entries", "entries", "directory", "code"))
    if kind == "bytes":
        return of_bytes(rng, whole)
    if kind == "directory":
        return of_zip_directory(rng, whole)
    if kind == "code" and rng.random() < 0.3:
        return rng.choice(PICKLES)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    name, text = entries[at]
    packed = zipfile.ZIP_STORED
    if kind == "code":
        begun = text[:2] if text[:1] == b"\x80" else b""
        entries[at] = (
            name,
            rng.choice((lambda p: p, lambda p: begun + p[:-1] + b"0" + text[len(begun) :]))(rng.choice(PICKLES)),
        )
    elif kind == "pickle":
        entries[at] = name, of_pickle(rng, text)
    else:
        i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
        change = rng.choice(("drop", "twice", "empty", "swap", "order", "rename", "packed", "byteorder", "damage"))
        if change == "drop":
            del entries[i]
        elif change == "twice":
            entries.append(entries[i])
        elif change == "empty":
            entries[i] = entries[i][0], b""
        elif change == "swap":
            entries[i], entries[j] = (entries[i][0], entries[j][1]), (entries[j][0], entries[i][1])
        elif change == "order":
            rng.shuffle(entries)
        elif change == "rename":
            entries[i] = rng.choice(("x", "../x", "archive/x", entries[j][0])), entries[i][1]
        elif change == "packed":
            packed = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        elif change == "byteorder":
            entries = [(n, rng.choice((b"big", b"", b"x" * 99)) if n.endswith("byteorder") else x) for n, x in entries]
        else:
            entries[i] = entries[i][0], of_bytes(rng, entries[i][1] or b"\0")
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", packed) as archive:  # of a name twice
        for entry, content in entries:
            archive.writestr(entry, content)
    return out.getvalue()


def of_pickle(rng: Random, text: bytes) -> bytes:
    """Another number, another name or a damaged byte in a pickle."""
    opcodes = [(op.name, arg, at) for op, arg, at in pickletools.genops(text)]
    ends = [at for _, _, at in opcodes[1:]] + [len(text)]
    numbers = [i for i, (name, _, _) in enumerate(opcodes) if name in ("BININT", "BININT1", "BININT2", "LONG1")]
    names = [i for i, (name, _, _) in enumerate(opcodes) if name == "GLOBAL"]
    kind = rng.choice(("number",) * 4 + ("global", "bytes"))
    if kind == "number" and numbers:
        i = rng.choice(numbers)
        value = rng.choice((*EDGES, -1, -2, 3, 5, 10**6))
        new = b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
    elif kind == "global" and names:
        i = rng.choice(names)
        kinds = (
            "FloatStorage",
            "HalfStorage",
            "LongStorage",
            "BoolStorage",
            "ComplexFloatStorage",
            "QInt8Storage",
            "Size",
        )
        more = (b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n")
        new = rng.choice((*(f"ctorch\n{name}\n".encode() for name in kinds), *more, b"ccollections\nOrderedDict\n"))
    else:
        return of_bytes(rng, text)
    return text[: opcodes[i][2]] + new + text[ends[i] :]


def of_zip_directory(rng: Random, whole: bytes) -> bytes:
    """A number in a header of an entry, in the directory or at its end: sizes, offsets, methods, checksums."""
    x = bytearray(whole)
    mark, fields = rng.choice(
        (
            (b"PK\x03\x04", ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
            (b"PK\x01\x02", ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4))),
            (b"PK\x05\x06", ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
        )
    )
    starts = [i for i in range(len(x)) if x.startswith(mark, i)]
    if starts:
        start, (at, width) = rng.choice(starts), rng.choice(fields)
        number = int.from_bytes(x[start + at : start + at + width], "little") + rng.choice((-64, -1, 1, 64, *EDGES))
        x[start + at : start + at + width] = (number % 256**width).to_bytes(width, "little")
    return bytes(x)


def of_image(rng: Random, whole: bytes) -> bytes:
    """Damage, or a header that promises another size than there is."""
    if rng.random() < 0.8:
        return of_bytes(rng, whole)
    x, side = bytearray(whole), rng.choice((0, 1, 2, 100, 1000, 9_000, 13_000, 2**15 - 1, 2**16 - 1, 2**31 - 1))
    width, height = rng.choice(((side, side), (side, 1), (1, side)))
    if x.startswith(b"\x89PNG"):
        x[16:24] = struct.pack(">II", width, height)
        x[29:33] = struct.pack(">I", zlib.crc32(x[12:29]))
    elif x.startswith(b"GIF8"):
        x[6:10] = struct.pack("<HH", width % 2**16, height % 2**16)
    elif x.startswith(b"BM"):
        x[18:26] = struct.pack("<ii", width, rng.choice((height, -height)))
    elif x.startswith(b"RIFF"):
        x[24:30] = struct.pack("<I", width % 2**24)[:3] + struct.pack("<I", height % 2**24)[:3]
    elif x.startswith(b"\xff\xd8") and (at := max(x.find(b"\xff\xc0"), x.find(b"\xff\xc2"))) > 0:
        x[at + 5 : at + 9] = struct.pack(">HH", height % 2**16, width % 2**16)
    elif x.startswith(b"II*\0"):
        for tag, value in ((256, width), (257, height)):
            if (at := x.find(struct.pack("<H", tag))) > 0:
                x[at + 2 : at + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(x)
