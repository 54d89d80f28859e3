"""All that a search has found, on disk as soon as it is known: one JSON object a line, only ever appended to.

The first row ("search") says what was searched and with what; the name of the file holds a hash of it, so another
kernel, space, cost model, gate, Triton or device has a journal of its own. Then come, in any order,

    compiled   config, sizes as the compiler tells them apart, registers, spills, shared, reason (null: may be launched)
    gated      config, sizes as above, reason (null: may be timed)
    tune       config, sizes, status, reason, seconds, predicted, timer: one a candidate; the status is "timed", or
               "predicted" for one that the cost model does not call the best and that no gate has seen, or the stage
               that was not passed: cost, compile, gate, time

A last line that was cut off is dropped: what it said is found again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vila_triton.files.json_schema import is_a, require_form
from vila_triton.files.reading import LoadError, shown
from vila_triton.registry import OPS
from vila_triton.registry.search_space import canonical, digest

from ..measure import rows

Key = tuple[str, str]
FOUND = {"config": dict, "sizes": dict, "reason": (str, None)}
TUNE = FOUND | dict.fromkeys(("status", "date", "commit", "torch"), str) | {"seconds": (float, None)}
FORMS = {"search": {"op": str, "impl": str}, "compiled": FOUND, "gated": FOUND, "tune": TUNE}  # of rows, by kind


def key(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> Key:
    return canonical(config), canonical(sizes)


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal. Errors: `LoadError` naming file, line and field of what is none; ValueError."""
    for number, row in enumerate(rows.read(file), 1):
        where = f"{file}:{number}"
        require_form(row, {"kind": str}, where)
        require_form(row, FORMS.get(row["kind"], {}), where)
        if number == 1 and row["kind"] != "search":
            raise LoadError(f"{where} does not say what was searched")
        if row["kind"] == "tune":
            require_sizes(row["sizes"], row.get("op"), where)
            if row["status"] == "timed" and not (row["seconds"] and row["seconds"] > 0):
                raise LoadError(f"{where}, seconds is {row['seconds']}, expected a time above 0")
        yield row


def require_sizes(sizes: Mapping[str, Any], op: Any, where: str) -> None:
    """Errors: `LoadError` for sizes that are not those of the op."""
    if op not in OPS:
        raise LoadError(f"{where}, op is {shown(op)}, which does not exist")
    names, varying = OPS[op].domain.keys(), OPS[op].varying
    if sizes.keys() != names:
        raise LoadError(f"{where}, sizes are {shown(', '.join(sizes))}, expected {', '.join(names)}")
    for name, size in sizes.items():
        if not (is_a(size, int) and size >= 0 if name in varying else isinstance(size, str | int | float | None)):
            raise LoadError(f"{where}, sizes, {name} is {shown(size)}, expected a size")


class Journal:
    """`found[kind]`: the rows of a kind by config and sizes."""

    def __init__(self, folder: Path, search: Mapping[str, Any]):
        self.file = folder / f"{search['op']}-{search['impl']}-{digest(canonical(search).encode())}.jsonl"
        self.about = {key: search[key] for key in ("op", "impl")}
        self.found: dict[str, dict[Key, dict[str, Any]]] = {"compiled": {}, "gated": {}, "tune": {}}
        known = list(read(self.file)) if self.file.exists() else []
        if known and known[0] != {"kind": "search", **search}:
            raise LoadError(f"{self.file}:1 is of another search than its name says")
        for row in known:
            self.keep(row)
        if not known:
            rows.write(self.file, [{"kind": "search", **search}])

    def keep(self, row: dict[str, Any]) -> None:
        if row["kind"] in self.found:
            self.found[row["kind"]][key(row["config"], row["sizes"])] = row

    def add(self, kind: str, config: Mapping[str, Any], sizes: Mapping[str, Any], **rest: Any) -> None:
        row = {"kind": kind, **self.about, "config": dict(config), "sizes": dict(sizes), **rest}
        rows.write(self.file, [row])
        self.keep(row)

    def get(self, kind: str, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any] | None:
        return self.found[kind].get(key(config, sizes))


def searches(folder: Path, op: str, impl: str) -> dict[Path, dict[str, Any]]:
    """The journals of an implementation in a folder, and what each says was searched."""
    found = {}
    for file in sorted(folder.glob(f"{op}-{impl}-*.jsonl")):
        if b"\n" in file.read_bytes():
            first = next(read(file))
            if (first["op"], first["impl"]) == (op, impl):
                found[file] = first
    return found
