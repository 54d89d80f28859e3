"""Read files that others wrote: checked before they are opened, with strict JSON, and shortened in error messages.

All JSON in the package is read with `parse_json` or `read_json`. A checkpoint is a folder that holds all its files:
`require_contained` follows symbolic links only within it, and to the blobs of Hugging Face's cache, whose folders are
made of such links.
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
    """A file does not exist, or does not hold what it must."""


def short_repr(value: Any) -> str:
    """The `repr` of a value for an error message, shortened."""
    text = SHORT_REPR.repr(value)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


def join_items(items: Iterable[object], max_items: int = 8, separator: str = ", ") -> str:
    """Join items for an error message: a, b, c and 97 more."""
    texts = list(map(str, items))
    suffix = f"{separator}and {len(texts) - max_items} more" if len(texts) > max_items else ""
    return separator.join(texts[:max_items]) + suffix


def require_file(path: Path) -> None:
    """Check that a path is a file, since opening a FIFO or a device could block for ever. Errors: `LoadError`."""
    if path.is_file():
        return
    if not path.exists():
        raise LoadError(f"{path} does not exist")
    kind = "a folder" if path.is_dir() else "a FIFO" if path.is_fifo() else "a device or a socket"
    raise LoadError(f"{path} is {kind}, expected a file")


def require_contained(checkpoint: Path, *folders: Path) -> None:
    """Check that folders of a checkpoint, and what lies in them, are files and folders that do not lead out of it.

    Errors: `LoadError`.
    """
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
    """The folder that a config names, None if there is none. Errors: `LoadError` if it is outside the checkpoint."""
    try:
        folder = checkpoint / name
        if not folder.is_dir():
            return None
    except (OSError, ValueError):  # no name that a folder could have
        return None
    require_contained(checkpoint, folder)
    return folder


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the object in a JSON file. Errors: `LoadError` naming the file, for everything that can be wrong with it."""
    require_file(path)
    if (size := path.stat().st_size) > max_bytes:
        raise LoadError(f"{path} is not read: it has {size} bytes, expected at most {max_bytes}")
    values = parse_json(path.read_bytes(), path)
    if not isinstance(values, dict):
        raise LoadError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def parse_json(text: bytes | str, where: object) -> Any:
    """Parse a JSON text in which no key is repeated and every number is finite.

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
    """Parse a number. Errors: ValueError for infinities and NaN."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def reject_duplicate_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dictionary from the pairs of a JSON object. Errors: ValueError for a key that is there twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"it has {short_repr(key)} twice")
        result[key] = value
    return result
