"""Files that others wrote: looked at before they are opened, JSON in them read strictly, shown in errors shortened.

Everything in the package that reads JSON reads it with `parse_json` or `read_json`. A checkpoint is a folder, and what
belongs to it lies in it: `require_own` follows symbolic links only within it, and to the blobs of Hugging Face's cache,
of which the folders of that cache are made.
"""

import json
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 24  # bytes of a JSON file, unless its reader says otherwise
MAX_JSON_DEPTH = 64  # lists and objects in each other
SHORT_REPR = reprlib.Repr()
SHORT_REPR.maxstring = SHORT_REPR.maxother = 80
SHORT_REPR.maxlevel = 2


class LoadError(ValueError):
    """A file is not there, or not what it has to be."""


def short_repr(value: Any) -> str:
    """A value for an error: its `repr`, shortened."""
    text = SHORT_REPR.repr(value)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


def join_items(items: Iterable[object], max_items: int = 8, separator: str = ", ") -> str:
    """Items for an error: a, b, c and 97 more."""
    texts = list(map(str, items))
    suffix = f"{separator}and {len(texts) - max_items} more" if len(texts) > max_items else ""
    return separator.join(texts[:max_items]) + suffix


def require_file(path: Path) -> None:
    """Errors: `LoadError` unless it is a file. Opening a FIFO or a device would wait for what may never come."""
    if path.is_file():
        return
    if not path.exists():
        raise LoadError(f"{path} does not exist")
    kind = "a folder" if path.is_dir() else "a FIFO" if path.is_fifo() else "a device or a socket"
    raise LoadError(f"{path} is {kind}, expected a file")


def require_contained(checkpoint: Path, *folders: Path) -> None:
    """Errors: `LoadError` for a folder of a checkpoint, or what lies in one, that leads out of it or is no file."""
    root = checkpoint.resolve()
    for path in (path for folder in folders for path in (folder, *sorted(folder.iterdir()))):
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError):
            raise LoadError(f"{path} is a symbolic link in a circle") from None
        is_blob = resolved.parent.name == "blobs" and resolved.parents[1].name.startswith("models--")
        if not (resolved.is_relative_to(root) or is_blob):
            raise LoadError(f"{path} leads out of the checkpoint, to {resolved}; put what is there into {checkpoint}")
        if resolved.exists() and not resolved.is_dir():
            require_file(path)


def find_folder(checkpoint: Path, name: str) -> Path | None:
    """The folder that a config names, if there is one. Errors: `LoadError` if it is not in the checkpoint."""
    try:
        folder = checkpoint / name
        if not folder.is_dir():
            return None
    except (OSError, ValueError):  # no name that a folder could have
        return None
    require_contained(checkpoint, folder)
    return folder


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Errors: `LoadError` naming the file, for whatever is wrong with it."""
    require_file(path)
    if (size := path.stat().st_size) > max_bytes:
        raise LoadError(f"{path} is not read: it has {size} bytes, expected at most {max_bytes}")
    values = parse_json(path.read_bytes(), path)
    if not isinstance(values, dict):
        raise LoadError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def parse_json(text: bytes | str, where: object) -> Any:
    """The value of a JSON text, in which no key is repeated and every number is finite.

    Errors: `LoadError` that begins with `where`.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        values = json.loads(
            text, object_pairs_hook=reject_duplicate_keys, parse_constant=parse_finite, parse_float=parse_finite
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start]
        raise LoadError(
            f"{where} holds half of a character, {surrogate!a} (a lone surrogate), which is no text"
        ) from None
    except RecursionError:
        raise LoadError(f"{where} is nested deeper than {MAX_JSON_DEPTH} lists and objects") from None
    except ValueError as error:
        raise LoadError(f"{where} is not JSON: {error}") from None
    nested = [[values]]
    for _ in range(MAX_JSON_DEPTH + 1):
        children = (x for item in nested for x in (item.values() if isinstance(item, dict) else item))
        nested = [x for x in children if isinstance(x, dict | list)]
    if nested:
        raise LoadError(f"{where} is nested deeper than {MAX_JSON_DEPTH} lists and objects")
    return values


def parse_finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def reject_duplicate_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"it has {short_repr(key)} twice")
        result[key] = value
    return result
