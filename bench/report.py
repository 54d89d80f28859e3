"""Write rows as one HTML page: `python -m bench.report ROWS.jsonl --out FILE.html`

The page shows device and versions, the kernels that are right, the goals, every time with its share of the peak rates,
the model, the searches, plots, and the cases that were not timed with the reason. It needs no other file and no
network. Rows that no section shows are listed at its end. A device, a date and a commit make a run; each run has its
own part.
"""

import argparse
import json
import math
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
from .goals import report_all_goals
from .measure import rows
from .measure.format import format_config, format_seconds
from .plots.figure import format_entries
from .plots.html_page import Html, details, heading, mark, page, paragraph, svg_image, table
from .plots.style import save_figure
from .tuner.table import TIMED_STATUSES

Row = Mapping[str, Any]
PLOTS = ("roofline", "speedup", "time", "model", "memory", "quality", "serve")
GOAL_STYLES = {"MET": "good", "NOT MET": "bad", "NOT MEASURED": "none", "met where it was measured": "none"}


def group_rows(records: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    """Returns the rows grouped by their values of these fields, as JSON; groups and rows keep their order."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in records:
        groups[tuple(json.dumps(row.get(name)) for name in names)].append(row)
    return groups


def percent(value: float) -> str:
    """Returns a fraction of 1 as a percentage with one decimal: 12.5%."""
    return f"{value:.1%}"


def format_values(values: Mapping[str, Any]) -> str:
    """Returns names and values as one text: n=4096 G=32."""
    return format_entries(values, values)


def correctness_tables(records: Sequence[Row]) -> Iterator[Html]:
    """A table of the number of items of each op by state, one of the wrong items, and the others by their reason."""
    states = list(dict.fromkeys(["right", *(row["state"] for row in records)]))
    count = {row["op"]: Counter[str]() for row in records}
    for row in records:
        count[row["op"]][row["state"]] += 1
    yield table(
        ["op", *states],
        [[op, *(str(counter[s]) for s in states)] for op, counter in count.items()],
        "-" + "n" * len(states),
    )
    failures = [row for row in records if row["state"] in ("wrong", "crashed")]
    if failures:
        yield table(
            ["op", "what", "why"], [[row["op"], describe_row(row), mark(row["reason"], "bad")] for row in failures]
        )
    yield from refused_groups([row for row in records if row["state"] not in ("right", "wrong", "crashed")])


def describe_row(row: Row) -> str:
    """The implementation, config, sizes and other fields of a row, in one line."""
    omitted = ("kind", "op", "reason", "impl", "config", "sizes", *rows.STAMP)
    parts = [row.get("impl", ""), format_config(row.get("config") or {}), format_values(row.get("sizes") or {})]
    return " ".join(
        part for part in [*parts, format_values({k: v for k, v in row.items() if k not in omitted})] if part
    )


def goal_table(records: Sequence[Row]) -> Iterator[Html]:
    """A line for each goal, and below it the points that miss it."""
    lines: list[list[str]] = []
    for line in report_all_goals([row for row in records if "op" not in row or "served" in row]):
        if match := re.match(r"goal (.+?): (NOT MEASURED|NOT MET|MET|met where it was measured)[:;]? ?(.*)", line):
            name, state, ratios = match.groups()
            lines.append([name, mark(state, GOAL_STYLES[state]), ratios])
        else:
            lines.append(["", "", line.strip()])
    if lines:
        yield heading(2, "Goals")
        yield table(["goal", "", "ratios"], lines)


def time_tables(records: Sequence[Row]) -> Iterator[Html]:
    """A table for each op and case, in which the default implementation is highlighted."""
    for of_op in group_rows(records, "op", "case").values():
        yield heading(3, f"{of_op[0]['op']}, {of_op[0]['case']}")
        lines, default_lines = [], []
        for of_sizes in group_rows(of_op, "sizes").values():
            for i, row in enumerate(sorted(of_sizes, key=lambda row: not row["served"])):
                default_lines += [len(lines)] if row["served"] else []
                lines.append(["" if i else format_values(row["sizes"]), *time_cells(row)])
        head = ["sizes", "implementation", "time", "spread", "noise", "GB/s", "of ceiling", "TFLOP/s", "of ceiling", ""]
        yield table(head, lines, "--nnnnnnn", default_lines)


def time_cells(row: Row) -> list[str]:
    """Returns the cells of a row with a time, from the implementation to the remarks; `time_tables` has their head."""
    seconds = row["seconds"]
    flags = {"not gated": not row["gated"], "cache warm": not row["cold"]}
    return [
        f"{row['impl']} {format_config(row['config'])}",
        format_seconds(seconds),
        percent((row["high"] - row["low"]) / seconds),
        percent(row["noise"]),
        f"{row['bytes'] / seconds / 1e9:.1f}",
        percent(row["bytes_share"]),
        f"{row['flops'] / seconds / 1e12:.3g}",
        percent(row["flops_share"]),
        ", ".join(name for name, odd in flags.items() if odd),
    ]


def default_first(records: Sequence[Row]) -> list[Row]:
    """The rows in their order, but of each step and weights the default kernels first."""
    steps = group_rows(records, "what", "weights", "batch", "prompt", "history", "context").values()
    return [row for of_step in steps for row in sorted(of_step, key=lambda row: row["choice"] != "default")]


def model_tables(records: Sequence[Row]) -> Iterator[Html]:
    """A table for each model: a line for each step, weights and kernels, with the time or peak memory and ratios."""
    for of_model in group_rows(records, "model", "layers").values():
        yield heading(3, f"{of_model[0]['model']}, {of_model[0]['layers']} layers of its language model")
        lines = []
        for row in default_first(of_model):
            step = format_values({k: row[k] for k in ("batch", "prompt", "history", "context") if k in row})
            name = [f"{row['what']}: {step}", row["weights"], row["choice"]]
            if row["what"] == "memory":
                lines.append([*name, f"{row['peak_bytes'] / 2**20:.1f} MiB", "", "", "", ""])
                continue
            ratios = [f"{row[key]:.3f}" if key in row else "" for key in ("ratio_hf", "ratio_first")]
            limit = percent(row["limit_seconds"] / row["seconds"])
            lines.append([*name, format_seconds(row["seconds"]), f"{row['tokens_per_s']:.1f}", limit, *ratios])
        head = ["step", "weights", "kernels", "time, memory", "tokens/s", "of limit", "x Hugging Face", "x first"]
        yield table(head, lines, "---nnnnn")


def serving_tables(records: Sequence[Row]) -> Iterator[Html]:
    """A table for each model: a line for each load and server, with times, throughput, right answers and ratios."""
    for of_model in group_rows(records, "model", "dtype").values():
        yield heading(3, f"{of_model[0]['model']}, {of_model[0]['dtype']}")
        lines = []
        for row in of_model:
            load = f"{row['streams']} streams" if row["what"] == "streams" else f"{row['rate']:g} requests/s"
            times = [format_seconds(row[key]) if key in row else "" for key in ("ttft", "ttft_p95", "tpot", "tpot_p95")]
            rates = [f"{row['tokens_per_s']:.1f}", f"{row['requests_per_s']:.2f}"]
            ratios = [
                " ".join(f"{row.get(peer, {}).get(key, math.nan):.2f}" for key in ("ttft", "tpot", "tokens_per_s"))
                for peer in ("ratio_vllm", "ratio_engine")
            ]
            lines.append(
                [load, row["choice"], *times, *rates, percent(row["right"]), str(row["errors"])]
                + [text.replace("nan", "-") for text in ratios]
            )
        head = ["load", "server", "first token", "95 %", "a token", "95 %", "tokens/s", "requests/s", "right", "errors"]
        yield table([*head, "x vLLM: first, token, tokens/s", "x engine"], lines, "--nnnnnnnnnn")


def tuning_tables(records: Sequence[Row]) -> Iterator[Html]:
    """The number of candidates of each search by status, and the best config at each of the sizes."""
    for of_search in group_rows(records, "op", "impl").values():
        timers = ", ".join(sorted({row["timer"] for row in of_search}))
        yield heading(3, f"{of_search[0]['op']} {of_search[0]['impl']}, by {timers}")
        states = Counter(row["status"] for row in of_search)
        yield paragraph(", ".join(f"{state}: {count}" for state, count in states.items()) + " candidates x sizes")
        lines = []
        for of_sizes in group_rows([row for row in of_search if row["status"] in TIMED_STATUSES], "sizes").values():
            best, worst = (which(of_sizes, key=lambda row: row["seconds"]) for which in (min, max))
            ratio = f"{worst['seconds'] / best['seconds']:.2f}"
            lines.append(
                [
                    format_values(best["sizes"]),
                    format_config(best["config"]),
                    format_seconds(best["seconds"]),
                    ratio,
                    str(len(of_sizes)),
                ]
            )
        if lines:
            yield table(["sizes", "best config", "time", "x slowest", "timed"], lines, "--nnn")


def error_table(records: Sequence[Row]) -> Iterator[Html]:
    """A table of the errors of each implementation, relative to the exact results, or the reason why it has none."""
    lines = [
        [format_values(row["sizes"]), f"{row['impl']} {format_config(row['config'])}"]
        + ([row["reason"], ""] if row["reason"] else [f"{row['rms']:.2e}", f"{row['worst']:.2e}"])
        for row in records
    ]
    yield table(["sizes", "implementation", "rms", "worst"], lines, "--nn")


def refused_groups(records: Sequence[Row]) -> Iterator[Html]:
    """The cases that were not timed, grouped by the reason."""
    groups = sorted(group_rows(records, "reason").values(), key=len, reverse=True)
    for of_reason in groups:
        title = f"{len(of_reason)} x {of_reason[0]['reason']}"
        yield details(title, "\n".join(f"{row.get('op', '')} {describe_row(row)}".strip() for row in of_reason))


def ceiling_paragraph(records: Sequence[Row]) -> Iterator[Html]:
    """A paragraph with the peak rates that were measured last: GB/s of memory, and TFLOP/s by dtype."""
    last = records[-1]
    rates = ", ".join(f"{name} {flops / 1e12:.3g} TFLOP/s" for name, flops in last["flops"].items())
    yield paragraph(f"Ceilings, measured last: {last['bandwidth'] / 1e9:.1f} GB/s, {rates}.")


def step_table(records: Sequence[Row]) -> Iterator[Html]:
    """A table of the steps of a suite: the state of each, the seconds it took, and the last line it printed."""
    styles = {"ok": "good", "left out": "none"}
    lines = [
        [row["step"], mark(row["state"], styles.get(row["state"], "bad")), f"{row['seconds']:.1f} s", row["last"][:160]]
        for row in records
    ]
    yield table(["step", "", "took", "its last line"], lines, "--n-")


@dataclass(frozen=True)
class Section:
    """A part of the page that shows the rows of one kind that have these fields."""

    title: str
    render: Callable[[Sequence[Row]], Iterator[Html]]
    fields: str


TIME = "op case sizes impl config served gated seconds low high noise bytes bytes_share flops flops_share cold"
SECTIONS = {  # by kind of row, in the order of the page
    "step": Section("Steps", step_table, "step state seconds last"),
    "correctness": Section("Correctness", correctness_tables, "op state reason"),
    "ceiling": Section("Times", ceiling_paragraph, "bandwidth flops"),
    "op": Section("", time_tables, TIME),
    "model": Section("The model", model_tables, "model layers what weights choice"),
    "serve": Section("Servers", serving_tables, "model dtype what choice tokens_per_s requests_per_s right errors"),
    "tune": Section("Searches", tuning_tables, "op impl config sizes status seconds timer"),
    "error": Section("Errors beside float64", error_table, "sizes impl config rms worst reason"),
    "refused": Section("Without a time", refused_groups, "reason"),
}
COVERED_KINDS = ("search", "compiled", "gated")  # rows of a journal that its `tune` rows say all of


def run_html(records: Sequence[Row], files: Sequence[Path]) -> Iterator[Html]:
    """The parts of the page about one run."""
    first = records[0]
    yield heading(1, first["device"])
    yield paragraph(" · ".join(f"{k} {first[k]}" for k in rows.STAMP if k in first and k != "device"), "stamp")
    yield from goal_table(records)
    for kind, section in SECTIONS.items():
        of_kind = [row for row in records if row["kind"] == kind]
        if of_kind:
            if section.title:
                yield heading(2, section.title)
            yield from section.render(of_kind)
    yield from plot_images(files, plot.run_label(first))


def plot_images(files: Sequence[Path], run: str) -> Iterator[Html]:
    """The plots of `bench.plot`, but not those of searches, which are too many and have tables."""
    yield heading(2, "Plots")
    try:
        loaded = plot.load_rows(files, run)
    except ValueError as error:
        yield paragraph(f"none: {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in PLOTS:
            make, kinds = plot.PLOTS[name]
            for plotted in make(loaded) if loaded[kinds[0]] else ():
                (svg,) = save_figure(
                    plotted.figure, Path(folder) / plotted.name, plot.single_run_stamp(plotted), [".svg"]
                )
                yield svg_image(svg.read_bytes(), plotted.name)


def has_section(row: Any) -> bool:
    """True if a section of the page shows the row."""
    section = SECTIONS.get(row["kind"]) if isinstance(row, dict) and "kind" in row else None
    return section is not None and all(field in row for field in f"{plot.RUN} {section.fields}".split())


def render_report(files: Sequence[Path]) -> str:
    """The page as HTML. Errors: ValueError if there is no row, or one is broken."""
    records = list(rows.read(*files))
    if not records:
        raise ValueError(f"no rows in {', '.join(map(str, files)) or 'no files'}")
    runs: dict[str, list[Row]] = defaultdict(list)
    unplaced = []
    for row in records:
        if has_section(row):
            runs[plot.run_label(row)].append(row)
        elif not (isinstance(row, dict) and row.get("kind") in COVERED_KINDS):
            unplaced.append(row)
    parts = [part for of_run in runs.values() for part in run_html(of_run, files)]
    if unplaced:
        lines = "\n".join(json.dumps(row) for row in unplaced)
        parts += [heading(2, "Other rows"), details(f"{len(unplaced)} rows this page has no place for", lines)]
    return page("vila-triton: " + ", ".join(dict.fromkeys(run.split(" | ")[0] for run in runs)), parts)


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl", help="or a folder of such files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    args = parser.parse_args(argv)
    html = render_report(plot.row_files(args.rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f"{args.out.name}.new")
    temporary.write_text(html)
    temporary.replace(args.out)
    print(f"{args.out}: {len(html) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
