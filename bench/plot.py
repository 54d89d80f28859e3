"""Draws figures from rows, and from rows alone: `python -m bench.plot ROWS.jsonl --out plots`

Each figure is a PNG and an SVG that shows the device, the date, the commit and the versions of its rows. Rows of
several devices, days or commits never share a figure: that is an error which names them, and `--run` chooses one. Of
repeated measurements in a run the last counts.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ._tool import tool
from .measure import rows
from .plots import models, ops, quality, serving, training, tuning
from .plots.figure import PlottedFigure, Row
from .plots.style import save_figure
from .tuner.table import TIMED_STATUSES

# The kinds of rows that a figure is made from; it cannot do without the first.
PLOTS: dict[str, tuple[Callable[[Mapping[str, Sequence[Row]]], Iterator[PlottedFigure]], list[str]]] = {
    "roofline": (ops.plot_roofline, ["op", "ceiling"]),
    "time": (ops.plot_time, ["op", "ceiling"]),
    "speedup": (ops.plot_speedup, ["op"]),
    "tuning": (tuning.plot_tuning, ["tune"]),
    "memory": (models.plot_memory, ["memory"]),
    "model": (models.plot_model, ["model"]),
    "predict": (models.plot_bounds, ["predict"]),
    "quality": (quality.plot_quality, ["quality"]),
    "training": (training.plot_training, ["training"]),
    "serve": (serving.plot_serving, ["serve"]),
}
RUN = "device date commit"
# The fields that tell rows of a kind apart, and those that a figure needs besides.
FIELDS = {
    "op": ("op impl case sizes config", "seconds low high cold flops bytes peer"),
    "ceiling": ("", "bandwidth flops"),
    **{f"tune {status}": ("op impl sizes config", "seconds timer") for status in TIMED_STATUSES},
    **{f"tune {status}": ("op impl sizes config", "") for status in ("gate", "compile", "cost", "time")},
    "memory": ("choice layers length chunk", "cache peak"),
    "model prefill": ("model layers weights choice batch prompt", "seconds"),
    "model streaming": ("model layers weights choice batch prompt history", "seconds"),
    "model decode": ("model layers weights choice batch context", "tokens_per_s"),
    "model memory": ("model layers weights choice batch prompt", "peak_bytes"),
    "quality": ("model method group samples seed", "kl perplexity"),
    "training": ("model layers weights choice checkpointed batch tokens", ""),
    "serve streams": ("model dtype choice streams", "tokens_per_s"),
    "serve arrivals": ("model dtype choice rate", "tokens_per_s"),
    "predict prefill": ("gpu model weights images prompt", "source seconds beyond"),
    "predict decode": ("gpu model weights context", "source seconds beyond"),
}
KINDS = list(dict.fromkeys(name.split()[0] for name in FIELDS))


def row_type(row: Row) -> str:
    """Returns the row's key in FIELDS."""
    return " ".join(str(row[name]) for name in ("kind", "what", "status") if name in row)


def read_rows(file: Path) -> Sequence[Row]:
    """Returns the rows of a file. A search of bench.tune, which may have been resumed on another day, is one run: its
    rows get the stamp of the last one, and the name of the file as `search`.

    Errors: ValueError naming file and line of a row that lacks a field its figure needs.
    """
    file_rows = list(rows.read(file))
    for number, row in enumerate(file_rows, 1):
        if not isinstance(row, dict) or "kind" not in row:
            raise ValueError(f"{file}:{number} is not a row: it has no field 'kind'")
        if row["kind"] not in KINDS:
            continue
        name = row_type(row)
        if name not in FIELDS:
            types = ", ".join(key for key in FIELDS if key.split()[0] == row["kind"])
            raise ValueError(f"{file}:{number} is a row {name!r}; known of this kind are: {types}")
        if missing := [field for field in " ".join((RUN, *FIELDS[name])).split() if field not in row]:
            raise ValueError(f"{file}:{number} is a row {name!r} without {', '.join(missing)}")
    if any(row["kind"] == "search" for row in file_rows):
        tune_rows = [row for row in file_rows if row["kind"] == "tune"]
        for row in tune_rows:
            row |= {field: tune_rows[-1][field] for field in RUN.split()} | {"search": file.stem}
    return file_rows


def load_rows(files: Sequence[Path], run: str) -> dict[str, list[Row]]:
    """Returns rows by kind, those whose run contains the text. Of repeated measurements in one run the last is kept."""
    latest: dict[str, Row] = {}
    replaced, unplotted = 0, Counter[str]()
    for row in (row for file in files for row in read_rows(file)):
        if row["kind"] not in KINDS:
            unplotted[row["kind"]] += 1
        elif run in run_label(row):
            fields = f"kind {RUN} {FIELDS[row_type(row)][0]}".split()
            key = json.dumps([row.get("what"), row.get("search"), *(row[field] for field in fields)])
            replaced += key in latest
            latest[key] = row
    if replaced:
        print(f"{replaced} rows were measured again later in the same run; the later ones are drawn")
    for kind, count in unplotted.items():
        print(f"{count} rows of kind {kind!r}: there is no figure of these")
    return {kind: [row for row in latest.values() if row["kind"] == kind] for kind in KINDS}


def row_files(paths: Sequence[Path]) -> list[Path]:
    """Returns files of rows, and those in folders."""
    return [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]


def run_label(row: Row) -> str:
    """Returns device, date and commit of a row."""
    return " | ".join(str(row[name]) for name in RUN.split())


def single_run_stamp(plotted: PlottedFigure) -> Row:
    """Returns the stamp of a figure. Errors: ValueError if its rows are of several runs."""
    runs = {run_label(row): row for row in plotted.rows}
    if len(runs) > 1:
        named = "".join(f"\n  {run}" for run in sorted(runs))
        raise ValueError(f"{plotted.name} would mix rows of {len(runs)} runs; choose one with --run TEXT:{named}")
    return next(iter(runs.values()))


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl", help="or a folder of such files")
    parser.add_argument("--out", type=Path, default=Path("plots"))
    parser.add_argument("--only", default=",".join(PLOTS), help=f"with commas, of {','.join(PLOTS)}")
    parser.add_argument("--run", default="", metavar="TEXT", help="only rows with TEXT in device | date | commit")
    args = parser.parse_args(argv)
    selected = args.only.split(",")
    if unknown := [name for name in selected if name not in PLOTS]:
        raise ValueError(f"no figure {', '.join(unknown)}; there are: {', '.join(PLOTS)}")
    files = row_files(args.rows)
    rows_by_kind = load_rows(files, args.run)
    if not files:
        raise ValueError(f"no rows (*.jsonl) in {', '.join(map(str, args.rows))}")
    count = draw_plots(rows_by_kind, selected, args.out)
    if not count:
        raise ValueError("nothing was drawn")
    return 0


def draw_plots(rows_by_kind: Mapping[str, Sequence[Row]], selected: Sequence[str], out: Path) -> int:
    """Writes the selected figures that have rows and says which have none; returns the number written."""
    count = 0
    for name in selected:
        plot, kinds = PLOTS[name]
        if not rows_by_kind[kinds[0]]:
            print(f"{name:10}no rows of kind {kinds[0]!r}")
            continue
        for kind in kinds[1:]:
            if not rows_by_kind[kind]:
                print(f"{name:10}without rows of kind {kind!r}")
        for plotted in plot(rows_by_kind):
            png, svg = save_figure(plotted.figure, out / plotted.name, single_run_stamp(plotted))
            print(f"{name:10}{png} {svg.name}  {len(plotted.rows)} rows", flush=True)
            count += 1
    return count


if __name__ == "__main__":
    sys.exit(main())
