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

LIMIT = 1 << 24  # bytes of a JSON file, unless its reader says otherwise
DEPTH = 64  # lists and objects in each other
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 80
SHOWN.maxlevel = 2


class LoadError(ValueError):
    """A file is not there, or not what it has to be."""


def shown(value: Any) -> str:
    """A value for an error: its `repr`, shortened."""
    text = SHOWN.repr(value)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


def listed(items: Iterable[object], most: int = 8, between: str = ", ") -> str:
    """Items for an error: a, b, c and 97 more."""
    words = list(map(str, items))
    more = f"{between}and {len(words) - most} more" if len(words) > most else ""
    return between.join(words[:most]) + more


def require_file(path: Path) -> None:
    """Errors: `LoadError` unless it is a file. Opening a FIFO or a device would wait for what may never come."""
    if path.is_file():
        return
    if not path.exists():
        raise LoadError(f"{path} does not exist")
    kind = "a folder" if path.is_dir() else "a FIFO" if path.is_fifo() else "a device or a socket"
    raise LoadError(f"{path} is {kind}, expected a file")


def require_own(checkpoint: Path, *places: Path) -> None:
    """Errors: `LoadError` for a folder of a checkpoint, or what lies in one, that leads out of it or is no file."""
    home = checkpoint.resolve()
    for path in (path for place in places for path in (place, *sorted(place.iterdir()))):
        try:
            real = path.resolve()
        except (OSError, RuntimeError):
            raise LoadError(f"{path} is a symbolic link in a circle") from None
        blob = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
        if not (real.is_relative_to(home) or blob):
            raise LoadError(f"{path} leads out of the checkpoint, to {real}; put what is there into {checkpoint}")
        if real.exists() and not real.is_dir():
            require_file(path)


def folder_in(checkpoint: Path, said: str) -> Path | None:
    """The folder that a config names, if there is one. Errors: `LoadError` if it is not in the checkpoint."""
    try:
        place = checkpoint / said
        if not place.is_dir():
            return None
    except (OSError, ValueError):  # no name that a folder could have
        return None
    require_own(checkpoint, place)
    return place


def read_json(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The object in a JSON file. Errors: `LoadError` naming the file, for whatever is wrong with it."""
    require_file(path)
    if (size := path.stat().st_size) > limit:
        raise LoadError(f"{path} is not read: it has {size} bytes, expected at most {limit}")
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
        values = json.loads(text, object_pairs_hook=distinct, parse_constant=finite, parse_float=finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise LoadError(f"{where} holds half of a character, {half!a} (a lone surrogate), which is no text") from None
    except RecursionError:
        raise LoadError(f"{where} is nested deeper than {DEPTH} lists and objects") from None
    except ValueError as error:
        raise LoadError(f"{where} is not JSON: {error}") from None
    level = [[values]]
    for _ in range(DEPTH + 1):
        within = (x for held in level for x in (held.values() if isinstance(held, dict) else held))
        level = [x for x in within if isinstance(x, dict | list)]
    if level:
        raise LoadError(f"{where} is nested deeper than {DEPTH} lists and objects")
    return values


def finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has {shown(key)} twice")
        found[key] = value
    return found
