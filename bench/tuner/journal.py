"""The journal of a search: each result on disk as soon as it is known, one JSON object per line, only ever appended to.

The first row ("search") says what was searched and with what. The name of the file contains its hash, so another
kernel, search space, cost model, gate, Triton or device has a journal of its own. Then come, in any order,

    compiled   config, sizes as the compiler sees them, registers, spills, shared, reason (null: may be launched)
    emulated   config, sizes as above, reason (null: it ran), sectors, fewest_sectors, accesses, wavefronts
    gated      config, sizes as above, reason (null: may be timed)
    tune       config, sizes, status, reason, seconds, predicted, timer: one per candidate. The status is "timed",
               "predicted" for a candidate that the cost model does not call the best and that was not gated, or the
               stage that it did not pass: cost, compile, emulate, gate, time

A last line that was cut off is removed, and its result is computed again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vila_triton.files.json_schema import is_json_type, require_schema
from vila_triton.files.reading import LoadError, short_repr
from vila_triton.hashing import canonical_json, short_hash
from vila_triton.registry import OPS

from ..measure import rows

Key = tuple[str, str]
RESULT_FORM = {"config": dict, "sizes": dict, "reason": (str, None)}
TUNE_FORM = RESULT_FORM | dict.fromkeys(("status", "date", "commit", "torch"), str) | {"seconds": (float, None)}
FORMS = {
    "search": {"op": str, "impl": str},
    "compiled": RESULT_FORM,
    "emulated": RESULT_FORM,
    "gated": RESULT_FORM,
    "tune": TUNE_FORM,
}  # of rows, by kind


def row_key(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> Key:
    """Returns a key of a config and sizes."""
    return canonical_json(config), canonical_json(sizes)


def read_journal(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a journal. Errors: `LoadError` naming file, line and field of an entry that is none;
    ValueError.
    """
    for number, row in enumerate(rows.read(file), 1):
        where = f"{file}:{number}"
        require_schema(row, {"kind": str}, where)
        require_schema(row, FORMS.get(row["kind"], {}), where)
        if number == 1 and row["kind"] != "search":
            raise LoadError(f"{where} does not say what was searched")
        if row["kind"] == "tune":
            check_sizes(row["sizes"], row.get("op"), where)
            if row["status"] == "timed" and not (row["seconds"] and row["seconds"] > 0):
                raise LoadError(f"{where}, seconds is {row['seconds']}, expected a time above 0")
        yield row


def check_sizes(sizes: Mapping[str, Any], op: Any, where: str) -> None:
    """Checks that sizes are those of the op. Errors: `LoadError`."""
    if op not in OPS:
        raise LoadError(f"{where}, op is {short_repr(op)}, which does not exist")
    names, varying = OPS[op].domain.keys(), OPS[op].dynamic_sizes
    if sizes.keys() != names:
        raise LoadError(f"{where}, sizes are {short_repr(', '.join(sizes))}, expected {', '.join(names)}")
    for name, size in sizes.items():
        if not (
            is_json_type(size, int) and size >= 0 if name in varying else isinstance(size, str | int | float | None)
        ):
            raise LoadError(f"{where}, sizes, {name} is {short_repr(size)}, expected a size")


class Journal:
    """The journal of one search; `entries[kind]` are the rows of a kind by config and sizes."""

    def __init__(self, folder: Path, search: Mapping[str, Any]):
        self.file = folder / f"{search['op']}-{search['impl']}-{short_hash(canonical_json(search).encode())}.jsonl"
        self.labels = {key: search[key] for key in ("op", "impl")}
        self.entries: dict[str, dict[Key, dict[str, Any]]] = {
            kind: {} for kind in ("compiled", "emulated", "gated", "tune")
        }
        old_rows = list(read_journal(self.file)) if self.file.exists() else []
        if old_rows and old_rows[0] != {"kind": "search", **search}:
            raise LoadError(f"{self.file}:1 is of another search than its name says")
        for row in old_rows:
            self.remember(row)
        if not old_rows:
            rows.write(self.file, [{"kind": "search", **search}])

    def remember(self, row: dict[str, Any]) -> None:
        """Adds a row to `entries`."""
        if row["kind"] in self.entries:
            self.entries[row["kind"]][row_key(row["config"], row["sizes"])] = row

    def add(self, kind: str, config: Mapping[str, Any], sizes: Mapping[str, Any], **rest: Any) -> None:
        """Writes a row."""
        row = {"kind": kind, **self.labels, "config": dict(config), "sizes": dict(sizes), **rest}
        rows.write(self.file, [row])
        self.remember(row)

    def get(self, kind: str, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the row of a config and sizes, None if there is none."""
        return self.entries[kind].get(row_key(config, sizes))


def find_journals(folder: Path, op: str, impl: str) -> dict[Path, dict[str, Any]]:
    """Returns the journals of an implementation in a folder, with the first row of each."""
    journals = {}
    for file in sorted(folder.glob(f"{op}-{impl}-*.jsonl")):
        if b"\n" in file.read_bytes():
            header = next(read_journal(file))
            if (header["op"], header["impl"]) == (op, impl):
                journals[file] = header
    return journals
