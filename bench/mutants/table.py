"""Mutants in tables: by file and by rule, and the survivors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
COLUMNS = ("drawn", "check", "tests", "hung or crashed", "survived", "equivalent")
COLUMN_OF = {
    "check": "check",
    "import": "check",
    "tests": "tests",
    "hung": "hung or crashed",
    "crashed": "hung or crashed",
}


def column_of(row: Row, equivalent: Mapping[str, Any]) -> str:
    """Returns the column that counts a mutant: what found it, else whether it is known to be equivalent."""
    return COLUMN_OF.get(row["found_by"]) or ("equivalent" if row["id"] in equivalent else "survived")


def counts(rows: Sequence[Row], equivalent: Mapping[str, Any]) -> list[int]:
    """Returns the number of mutants in each of `COLUMNS`."""
    columns = [column_of(row, equivalent) for row in rows]
    return [len(rows), *(columns.count(name) for name in COLUMNS[1:])]


def table_lines(
    rows: Sequence[Row], equivalent: Mapping[str, Any], group: Callable[[Row], str], title: str
) -> Iterator[str]:
    """Yields a table in Markdown with a line for each group of mutants, and one for all."""
    yield f"| {title} | {' | '.join(COLUMNS)} |"
    yield f"|---|{'--:|' * len(COLUMNS)}"
    for name in sorted({group(row) for row in rows}):
        numbers = counts([row for row in rows if group(row) == name], equivalent)
        yield f"| {name} | {' | '.join(str(n or '') for n in numbers)} |"
    yield f"| all | {' | '.join(map(str, counts(rows, equivalent)))} |"


def summary(rows: Sequence[Row], equivalent: Mapping[str, Any]) -> str:
    """Returns the share of mutants found, of those that are not equivalent, in one line."""
    drawn, *_, survived, same = counts(rows, equivalent)
    found = drawn - survived - same
    share = 100 * found / max(1, drawn - same)
    return f"found {found} of {drawn - same} ({share:.1f} %), {survived} survived; {same} of {drawn} are equivalent"


def survivor_lines(rows: Iterable[Row], equivalent: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each survivor: id, place, rule, change, and why nothing could find it, if that is known."""
    for row in sorted(rows, key=lambda row: (row["file"], row["line"])):
        if column_of(row, equivalent) == "survived":
            before, after = (" ".join(row[name].split()) or "(nothing)" for name in ("before", "after"))
            why = f"  ({row['detail']})" if row["detail"] else ""
            yield f"{row['id']}  {row['file']}:{row['line']}  {row['rule']}: `{before}` -> `{after}`{why}"


def report_lines(rows: Sequence[Row], equivalent: Mapping[str, Any]) -> Iterator[str]:
    """Yields both tables, the summary and the survivors."""
    yield from table_lines(rows, equivalent, lambda row: row["file"], "file")
    yield ""
    yield from table_lines(rows, equivalent, lambda row: row["rule"], "rule")
    yield from ("", summary(rows, equivalent))
    yield from survivor_lines(rows, equivalent)
