"""Pictures from rows, and from rows alone: `python -m bench.plot ROWS.jsonl --out pictures`

Each picture is a PNG and an SVG; in it stand the device, the date, the commit and the versions of the rows it shows.
Rows of several devices, days or commits never share a picture: that is an error which names them, and `--run` picks
one. What was measured twice in a run counts as it was the last time.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ._tool import tool
from .measure import rows
from .plots import models, ops, quality, tuning
from .plots.figure import Picture, Row
from .plots.style import save
from .tuner.table import TIMES

# Which kinds of rows a picture is made from; the first one it cannot do without.
PICTURES: dict[str, tuple[Callable[[Mapping[str, Sequence[Row]]], Iterator[Picture]], list[str]]] = {
    "roofline": (ops.roofline, ["op", "ceiling"]),
    "time": (ops.time, ["op", "ceiling"]),
    "speedup": (ops.speedup, ["op"]),
    "tuning": (tuning.tuning, ["tune"]),
    "memory": (models.memory, ["memory"]),
    "model": (models.model, ["model"]),
    "predict": (models.predict, ["predict"]),
    "quality": (quality.quality, ["quality"]),
}
RUN = "device date commit"
# The fields that tell rows of a kind apart, and those that a picture needs besides.
FIELDS = {
    "op": ("op impl case sizes config", "seconds low high cold flops bytes peer"),
    "ceiling": ("", "bandwidth flops"),
    **{f"tune {status}": ("op impl sizes config", "seconds timer") for status in TIMES},
    **{f"tune {status}": ("op impl sizes config", "") for status in ("gate", "compile", "cost", "time")},
    "memory": ("choice layers length chunk", "cache peak"),
    "model prefill": ("model layers weights choice batch prompt", "seconds"),
    "model stream": ("model layers weights choice batch prompt history", "seconds"),
    "model decode": ("model layers weights choice batch context", "tokens_per_s"),
    "model memory": ("model layers weights choice batch prompt", "peak_bytes"),
    "quality": ("model method group samples seed", "kl perplexity"),
    "predict prefill": ("gpu model weights pictures prompt", "source seconds beyond"),
    "predict decode": ("gpu model weights context", "source seconds beyond"),
}
KINDS = list(dict.fromkeys(name.split()[0] for name in FIELDS))


def variety(row: Row) -> str:
    """The row's key in FIELDS."""
    return " ".join(str(row[name]) for name in ("kind", "what", "status") if name in row)


def checked(file: Path) -> Sequence[Row]:
    """The rows of a file. A search of bench.tune, which may have been resumed on another day, is one run: its rows bear
    the stamp of the last one, and the name of the file as `search`.

    Errors: ValueError naming file and line of a row without a field that its picture needs.
    """
    found = list(rows.read(file))
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict) or "kind" not in row:
            raise ValueError(f"{file}:{number} is not a row: it has no field 'kind'")
        if row["kind"] not in KINDS:
            continue
        name = variety(row)
        if name not in FIELDS:
            known = ", ".join(key for key in FIELDS if key.split()[0] == row["kind"])
            raise ValueError(f"{file}:{number} is a row {name!r}; known of this kind are: {known}")
        if missing := [field for field in " ".join((RUN, *FIELDS[name])).split() if field not in row]:
            raise ValueError(f"{file}:{number} is a row {name!r} without {', '.join(missing)}")
    if any(row["kind"] == "search" for row in found):
        tuned = [row for row in found if row["kind"] == "tune"]
        for row in tuned:
            row |= {field: tuned[-1][field] for field in RUN.split()} | {"search": file.stem}
    return found


def load(files: Sequence[Path], run: str) -> dict[str, list[Row]]:
    """Rows by kind, those whose run contains the text. Rows of one run that tell of the same count once, the last."""
    latest: dict[str, Row] = {}
    replaced, others = 0, Counter[str]()
    for row in (row for file in files for row in checked(file)):
        if row["kind"] not in KINDS:
            others[row["kind"]] += 1
        elif run in run_of(row):
            fields = f"kind {RUN} {FIELDS[variety(row)][0]}".split()
            key = json.dumps([row.get("what"), row.get("search"), *(row[field] for field in fields)])
            replaced += key in latest
            latest[key] = row
    if replaced:
        print(f"{replaced} rows were measured again later in the same run; the later ones are drawn")
    for kind, count in others.items():
        print(f"{count} rows of kind {kind!r}: there is no picture of these")
    return {kind: [row for row in latest.values() if row["kind"] == kind] for kind in KINDS}


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Files of rows, and those in folders."""
    return [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]


def run_of(row: Row) -> str:
    return " | ".join(str(row[name]) for name in RUN.split())


def one_run(picture: Picture) -> Row:
    """The stamp of a picture. Errors: ValueError if its rows are of several runs."""
    runs = {run_of(row): row for row in picture.rows}
    if len(runs) > 1:
        named = "".join(f"\n  {run}" for run in sorted(runs))
        raise ValueError(f"{picture.name} would mix rows of {len(runs)} runs; choose one with --run TEXT:{named}")
    return next(iter(runs.values()))


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl", help="or a folder of such files")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    parser.add_argument("--only", default=",".join(PICTURES), help=f"with commas, of {','.join(PICTURES)}")
    parser.add_argument("--run", default="", metavar="TEXT", help="only rows with TEXT in device | date | commit")
    args = parser.parse_args(argv)
    chosen = args.only.split(",")
    if unknown := [name for name in chosen if name not in PICTURES]:
        raise ValueError(f"no picture {', '.join(unknown)}; there are: {', '.join(PICTURES)}")
    files = files_of(args.rows)
    found = load(files, args.run)
    if not files:
        raise ValueError(f"no rows (*.jsonl) in {', '.join(map(str, args.rows))}")
    count = draw(found, chosen, args.out)
    if not count:
        raise ValueError("nothing was drawn")
    return 0


def draw(found: Mapping[str, Sequence[Row]], chosen: Sequence[str], out: Path) -> int:
    """Write the chosen pictures that have rows, say which have none; returns how many were written."""
    count = 0
    for name in chosen:
        make, kinds = PICTURES[name]
        if not found[kinds[0]]:
            print(f"{name:10}no rows of kind {kinds[0]!r}")
            continue
        for kind in kinds[1:]:
            if not found[kind]:
                print(f"{name:10}without rows of kind {kind!r}")
        for picture in make(found):
            png, svg = save(picture.figure, out / picture.name, one_run(picture))
            print(f"{name:10}{png} {svg.name}  {len(picture.rows)} rows", flush=True)
            count += 1
    return count


if __name__ == "__main__":
    sys.exit(main())
