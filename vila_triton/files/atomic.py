"""Write a file atomically: whoever reads it meanwhile finds the old file or the new one, never a part."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def partial_path(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path to write to; the file there becomes `path` when the block ends without an error."""
    yield partial_path(path)
    partial_path(path).replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as a JSON file, atomically and with sorted keys."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
