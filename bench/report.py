"""Rows as one page: `python -m bench.report ROWS.jsonl --out FILE.html`

Device and versions, what is right, which goals are met, every time with its share of the ceilings, the model, the
searches, pictures, and what got no time and why. The page needs no other file and no network. Rows it has no place for
stand at its end. A device, a date and a commit make a run, and every run has its own part.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plot
from ._tool import tool
from .goals import met
from .measure import rows
from .measure.format import brief, unit
from .plots.figure import spelled
from .plots.html_page import Html, folded, heading, mark, page, paragraph, picture, table
from .plots.style import save
from .tuner.table import TIMES

Row = Mapping[str, Any]
DRAWN = ("roofline", "speedup", "time", "model", "memory", "quality")
STATES = {"MET": "good", "NOT MET": "bad", "NOT MEASURED": "none", "met where it was measured": "none"}


def grouped(found: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in found:
        groups[tuple(json.dumps(row.get(name)) for name in names)].append(row)
    return groups


def share(value: float) -> str:
    return f"{value:.1%}"


def text(values: Mapping[str, Any]) -> str:
    return spelled(values, values)


def correctness(found: Sequence[Row]) -> Iterator[Html]:
    """How many of each op are right, or what else became of them, then those that are wrong; the rest by the reason."""
    states = list(dict.fromkeys(["right", *(row["state"] for row in found)]))
    count = {row["op"]: Counter[str]() for row in found}
    for row in found:
        count[row["op"]][row["state"]] += 1
    yield table(
        ["op", *states], [[op, *(str(of[s]) for s in states)] for op, of in count.items()], "-" + "n" * len(states)
    )
    wrong = [row for row in found if row["state"] in ("wrong", "crashed")]
    if wrong:
        yield table(["op", "what", "why"], [[row["op"], about(row), mark(row["reason"], "bad")] for row in wrong])
    yield from refused([row for row in found if row["state"] not in ("right", "wrong", "crashed")])


def about(row: Row) -> str:
    """What a row without a place for each of its fields is about."""
    left = ("kind", "op", "reason", "impl", "config", "sizes", *rows.STAMP)
    parts = [row.get("impl", ""), brief(row.get("config") or {}), text(row.get("sizes") or {})]
    return " ".join(part for part in [*parts, text({k: v for k, v in row.items() if k not in left})] if part)


def goals(found: Sequence[Row]) -> Iterator[Html]:
    """A line for each goal; under it the points that fall short."""
    lines: list[list[str]] = []
    for line in met([row for row in found if "op" not in row or "served" in row]):
        if parts := re.match(r"goal (.+?): (NOT MEASURED|NOT MET|MET|met where it was measured)[:;]? ?(.*)", line):
            name, state, words = parts.groups()
            lines.append([name, mark(state, STATES[state]), words])
        else:
            lines.append(["", "", line.strip()])
    if lines:
        yield heading(2, "Goals")
        yield table(["goal", "", "ratios"], lines)


def times(found: Sequence[Row]) -> Iterator[Html]:
    """A table for each op, case and sizes; what runs by default stands out."""
    for of_op in grouped(found, "op", "case").values():
        yield heading(3, f"{of_op[0]['op']}, {of_op[0]['case']}")
        lines, ours = [], []
        for at in grouped(of_op, "sizes").values():
            for i, row in enumerate(sorted(at, key=lambda row: not row["served"])):
                ours += [len(lines)] if row["served"] else []
                lines.append(["" if i else text(row["sizes"]), *figures(row)])
        head = ["sizes", "implementation", "time", "spread", "noise", "GB/s", "of ceiling", "TFLOP/s", "of ceiling", ""]
        yield table(head, lines, "--nnnnnnn", ours)


def figures(row: Row) -> list[str]:
    seconds = row["seconds"]
    marks = {"not gated": not row["gated"], "cache warm": not row["cold"]}
    return [
        f"{row['impl']} {brief(row['config'])}",
        unit(seconds),
        share((row["high"] - row["low"]) / seconds),
        share(row["noise"]),
        f"{row['bytes'] / seconds / 1e9:.1f}",
        share(row["bytes_share"]),
        f"{row['flops'] / seconds / 1e12:.3g}",
        share(row["flops_share"]),
        ", ".join(name for name, odd in marks.items() if odd),
    ]


def default_first(found: Sequence[Row]) -> list[Row]:
    """The rows as they were measured, but of one step and weights what runs by default first."""
    steps = grouped(found, "what", "weights", "batch", "prompt", "history", "context").values()
    return [row for of_step in steps for row in sorted(of_step, key=lambda row: row["choice"] != "default")]


def model(found: Sequence[Row]) -> Iterator[Html]:
    for of_model in grouped(found, "model", "layers").values():
        yield heading(3, f"{of_model[0]['model']}, {of_model[0]['layers']} layers of its language model")
        lines = []
        for row in default_first(of_model):
            step = text({k: row[k] for k in ("batch", "prompt", "history", "context") if k in row})
            name = [f"{row['what']}: {step}", row["weights"], row["choice"]]
            if row["what"] == "memory":
                lines.append([*name, f"{row['peak_bytes'] / 2**20:.1f} MiB", "", "", "", ""])
                continue
            ratios = [f"{row[key]:.3f}" if key in row else "" for key in ("ratio_hf", "ratio_first")]
            limit = share(row["limit_seconds"] / row["seconds"])
            lines.append([*name, unit(row["seconds"]), f"{row['tokens_per_s']:.1f}", limit, *ratios])
        head = ["step", "weights", "kernels", "time, memory", "tokens/s", "of limit", "x Hugging Face", "x first"]
        yield table(head, lines, "---nnnnn")


def tuning(found: Sequence[Row]) -> Iterator[Html]:
    """What became of the candidates of each search, and the best at each of the sizes."""
    for search in grouped(found, "op", "impl").values():
        timers = ", ".join(sorted({row["timer"] for row in search}))
        yield heading(3, f"{search[0]['op']} {search[0]['impl']}, by {timers}")
        states = Counter(row["status"] for row in search)
        yield paragraph(", ".join(f"{state}: {count}" for state, count in states.items()) + " candidates x sizes")
        lines = []
        for at in grouped([row for row in search if row["status"] in TIMES], "sizes").values():
            best, worst = (which(at, key=lambda row: row["seconds"]) for which in (min, max))
            ratio = f"{worst['seconds'] / best['seconds']:.2f}"
            lines.append([text(best["sizes"]), brief(best["config"]), unit(best["seconds"]), ratio, str(len(at))])
        if lines:
            yield table(["sizes", "best config", "time", "x slowest", "timed"], lines, "--nnn")


def errors(found: Sequence[Row]) -> Iterator[Html]:
    lines = [
        [text(row["sizes"]), f"{row['impl']} {brief(row['config'])}"]
        + ([row["reason"], ""] if row["reason"] else [f"{row['rms']:.2e}", f"{row['worst']:.2e}"])
        for row in found
    ]
    yield table(["sizes", "implementation", "rms", "worst"], lines, "--nn")


def refused(found: Sequence[Row]) -> Iterator[Html]:
    """What got no time, by the reason."""
    groups = sorted(grouped(found, "reason").values(), key=len, reverse=True)
    for of_reason in groups:
        title = f"{len(of_reason)} x {of_reason[0]['reason']}"
        yield folded(title, "\n".join(f"{row.get('op', '')} {about(row)}".strip() for row in of_reason))


def ceilings(found: Sequence[Row]) -> Iterator[Html]:
    last = found[-1]
    rates = ", ".join(f"{name} {flops / 1e12:.3g} TFLOP/s" for name, flops in last["flops"].items())
    yield paragraph(f"Ceilings, measured last: {last['bandwidth'] / 1e9:.1f} GB/s, {rates}.")


def steps(found: Sequence[Row]) -> Iterator[Html]:
    kinds = {"ok": "good", "left out": "none"}
    lines = [
        [row["step"], mark(row["state"], kinds.get(row["state"], "bad")), f"{row['seconds']:.1f} s", row["last"][:160]]
        for row in found
    ]
    yield table(["step", "", "took", "its last line"], lines, "--n-")


@dataclass(frozen=True)
class Section:
    """What is made of the rows of a kind that have these fields."""

    title: str
    make: Callable[[Sequence[Row]], Iterator[Html]]
    fields: str


TIME = "op case sizes impl config served gated seconds low high noise bytes bytes_share flops flops_share cold"
SECTIONS = {  # by kind of row, in the order of the page
    "step": Section("Steps", steps, "step state seconds last"),
    "correctness": Section("Correctness", correctness, "op state reason"),
    "ceiling": Section("Times", ceilings, "bandwidth flops"),
    "op": Section("", times, TIME),
    "model": Section("The model", model, "model layers what weights choice"),
    "tune": Section("Searches", tuning, "op impl config sizes status seconds timer"),
    "error": Section("Errors beside float64", errors, "sizes impl config rms worst reason"),
    "refused": Section("Without a time", refused, "reason"),
}
IN_OTHERS = ("search", "compiled", "gated")  # rows of a journal that its `tune` rows say all of


def run_parts(found: Sequence[Row], files: Sequence[Path]) -> Iterator[Html]:
    """All of one run."""
    first = found[0]
    yield heading(1, first["device"])
    yield paragraph(" · ".join(f"{k} {first[k]}" for k in rows.STAMP if k in first and k != "device"), "stamp")
    yield from goals(found)
    for kind, section in SECTIONS.items():
        of_kind = [row for row in found if row["kind"] == kind]
        if of_kind:
            if section.title:
                yield heading(2, section.title)
            yield from section.make(of_kind)
    yield from pictures(files, plot.run_of(first))


def pictures(files: Sequence[Path], run: str) -> Iterator[Html]:
    """Those that bench.plot makes of the rows; searches stand in tables, a picture of each would be too many."""
    yield heading(2, "Pictures")
    try:
        loaded = plot.load(files, run)
    except ValueError as error:
        yield paragraph(f"none: {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in DRAWN:
            make, kinds = plot.PICTURES[name]
            for drawn in make(loaded) if loaded[kinds[0]] else ():
                (svg,) = save(drawn.figure, Path(folder) / drawn.name, plot.one_run(drawn), [".svg"])
                yield picture(svg.read_bytes(), drawn.name)


def place(row: Any) -> bool:
    """Whether there is one for a row."""
    section = SECTIONS.get(row["kind"]) if isinstance(row, dict) and "kind" in row else None
    return section is not None and all(field in row for field in f"{plot.RUN} {section.fields}".split())


def report(files: Sequence[Path]) -> str:
    """The page. Errors: ValueError if there is no row, or one is broken."""
    found = list(rows.read(*files))
    if not found:
        raise ValueError(f"no rows in {', '.join(map(str, files)) or 'no files'}")
    runs: dict[str, list[Row]] = defaultdict(list)
    others = []
    for row in found:
        if place(row):
            runs[plot.run_of(row)].append(row)
        elif not (isinstance(row, dict) and row.get("kind") in IN_OTHERS):
            others.append(row)
    parts = [part for of_run in runs.values() for part in run_parts(of_run, files)]
    if others:
        lines = "\n".join(json.dumps(row) for row in others)
        parts += [heading(2, "Other rows"), folded(f"{len(others)} rows this page has no place for", lines)]
    return page("vila-triton: " + ", ".join(dict.fromkeys(run.split(" | ")[0] for run in runs)), parts)


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl", help="or a folder of such files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    args = parser.parse_args(argv)
    text = report(plot.files_of(args.rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    whole = args.out.with_name(f"{args.out.name}.new")
    whole.write_text(text)
    whole.replace(args.out)
    print(f"{args.out}: {len(text) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
