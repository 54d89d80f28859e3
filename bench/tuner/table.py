"""From the journal of a search to its entry in a tuned table (`vila_triton.registry.tuned_tables`), and its regret.

The same rows give the same bytes, in whatever order they were found. A range of a size that varies ends at the
geometric mean of two neighboring sizes that were tuned; the first begins at 0 and the last has no end. With several
varying sizes the ranges of the second lie within one of the first, and so on: every size lies in exactly one range.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import inf, isqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from vila_triton.files.file_locks import sidecar_lock
from vila_triton.hashing import canonical_json
from vila_triton.registry import OPS, REFERENCE
from vila_triton.registry.kernel_config import configured_choices
from vila_triton.registry.search_space import Config
from vila_triton.registry.size_ranges import BoundedChoice, RangedChoice, implementation_at, merge_ranges
from vila_triton.registry.tuned_tables import config_for_sizes, read_table, table_path

from ..measure.format import format_config, format_seconds

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TunedPoint:
    """Sizes that were tuned, and the seconds of each config there, by the config's canonical text."""

    sizes: Mapping[str, Any]
    seconds: Mapping[str, float]

    @property
    def best(self) -> str:
        """The fastest config."""
        return min(self.seconds, key=lambda config: (self.seconds[config], config))

    def regret(self, config: str) -> float:
        """Returns a config's time over the best time; infinite if it has no time here."""
        return self.seconds.get(config, inf) / self.seconds[self.best]


REFUSED_STATUSES = ("cost", "compile", "emulate", "gate")
TIMED_STATUSES = ("timed", "predicted")  # the second: by the cost model, and nobody looked whether it is right


def tuned_points(rows: Iterable[Row]) -> list[TunedPoint]:
    """Returns the points that have times, by sizes."""
    seconds_by_sizes: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["status"] in TIMED_STATUSES:
            seconds_by_sizes.setdefault(canonical_json(row["sizes"]), {})[canonical_json(row["config"])] = row[
                "seconds"
            ]
    return [TunedPoint(json.loads(sizes), seconds_by_sizes[sizes]) for sizes in sorted(seconds_by_sizes)]


def split_ranges(points: Sequence[TunedPoint], varying: Sequence[str]) -> Iterator[tuple[dict[str, Any], TunedPoint]]:
    """Yields the ranges around points that differ in the varying sizes only."""
    if not varying:
        yield {}, points[0]
        return
    name, *rest = varying
    values = sorted({p.sizes[name] for p in points})
    for lower, value, upper in zip([None, *values], values, [*values[1:], None]):
        first = 0 if lower is None else isqrt(lower * value) + 1
        last = None if upper is None else isqrt(value * upper)
        for ranges, point in split_ranges([p for p in points if p.sizes[name] == value], rest):
            yield {name: [first, last], **ranges}, point


def table_ranges(points: Sequence[TunedPoint], varying: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the ranges of a table: for each set of fixed sizes that was tuned, those of the varying ones."""
    groups: dict[str, list[TunedPoint]] = {}
    for point in points:
        groups.setdefault(canonical_json({k: v for k, v in point.sizes.items() if k not in varying}), []).append(point)
    result = []
    for fixed in sorted(groups):
        for varying_ranges, point in split_ranges(groups[fixed], varying):
            tuned_at = {name: point.sizes[name] for name in varying}
            best = {"config": json.loads(point.best), "seconds": point.seconds[point.best]}
            result.append({"sizes": {**json.loads(fixed), **varying_ranges}, "tuned_at": tuned_at, **best})
    return result


def fallback_config(points: Sequence[TunedPoint], allowed: Set[str]) -> dict[str, Any]:
    """Returns the gated config that has times at the most sizes, and of those the one with the least worst regret."""
    missing, worst, config = least_regret_config(points, allowed)
    return {"config": json.loads(config), "worst_regret": worst, "sizes_without_time": missing}


def gated_configs(rows: Iterable[Row]) -> set[str]:
    """Returns the configs that passed the gate, by their canonical text."""
    return {canonical_json(row["config"]) for row in rows if row["status"] == "timed"}


def least_regret_config(points: Sequence[TunedPoint], allowed: Set[str] | None = None) -> tuple[int, float, str]:
    """Returns (sizes without a time, worst regret, config) of the config for which they are least."""
    configs = {c for point in points for c in point.seconds if allowed is None or c in allowed}
    missing = {c: sum(c not in p.seconds for p in points) for c in configs}
    worst = {c: max(p.regret(c) for p in points if c in p.seconds) for c in missing}
    return min((missing[c], worst[c], c) for c in missing)


def default_impls(op: str, size: int) -> set[str]:
    """Returns the implementations that configs/kernels.toml runs at this size on a GPU, in either phase."""
    return {
        implementation_at(configured_choices("cuda", phase).get(op, REFERENCE), size) for phase in ("prefill", "decode")
    }


def choose_impl(op: str, entries: Iterable[Row]) -> BoundedChoice | None:
    """Chooses the implementation of an op by the size that varies, from the entries of several implementations.

    Sizes count if the implementation that configs/kernels.toml runs was timed there: a search that was ended early may
    know of the others only that they can be run. For each value it is the implementation timed at the most of the sizes
    that go with it, and of those the one with the least worst regret; ranges meet where those of configs do. The choice
    holds from the first to the last value; None if no size counts.
    """
    varying = OPS[op].dynamic_sizes[0]
    seconds: dict[str, dict[str, float]] = {}
    for table_entry in entries:
        for r in table_entry["ranges"]:
            seconds.setdefault(canonical_json({**r["sizes"], **r["tuned_at"]}), {})[table_entry["impl"]] = r["seconds"]
    points = [TunedPoint(json.loads(sizes), config_seconds) for sizes, config_seconds in seconds.items()]
    points = [p for p in points if default_impls(op, p.sizes[varying]) <= p.seconds.keys()]
    if not points:
        return None
    values = sorted({p.sizes[varying] for p in points})
    best = [least_regret_config([p for p in points if p.sizes[varying] == value])[2] for value in values]
    pieces = [(isqrt(value * upper), name) for value, upper, name in zip(values, values[1:], best)]
    return BoundedChoice(values[0], values[-1], merge_ranges(pieces, best[-1]))


def choose_impls(entries: Sequence[Row]) -> dict[str, Any]:
    """Returns the choices of a table, by op, for the ops of which it has several entries."""
    ops = sorted({e["op"] for e in entries if e["op"] in OPS and OPS[e["op"]].dynamic_sizes})
    entries_of_op = {op: [e for e in entries if e["op"] == op] for op in ops}
    chosen = {op: choose_impl(op, entries_of_op[op]) for op in ops if len(entries_of_op[op]) > 1}
    return {op: {"first": w.first, "last": w.last, "choice": choice_to_json(w.choice)} for op, w in chosen.items() if w}


def choice_to_json(choice: RangedChoice) -> Any:
    """Returns a choice as it stands in a file."""
    if isinstance(choice, str):
        return choice
    return [*map(list, zip(choice.ends, choice.names)), choice.names[-1]]


def build_entry(search: Row, rows: Sequence[Row], varying: Sequence[str]) -> dict[str, Any] | None:
    """Returns the entry of a search; None as long as nothing was timed."""
    points = tuned_points(rows)
    if not points:
        return None
    statuses = [row["status"] for row in rows]
    last = max(rows, key=lambda row: (row["date"], row["commit"]))
    return {
        **{key: value for key, value in search.items() if key not in ("kind", "device")},
        **{key: last[key] for key in ("date", "commit", "torch")},
        "candidates": {status: statuses.count(status) for status in REFUSED_STATUSES + TIMED_STATUSES},
        "ranges": table_ranges(points, varying),
        "otherwise": fallback_config(points, gated_configs(rows)),
    }


def write_table(folder: Path, device: str, new: Mapping[str, Any]) -> Path:
    """Writes an entry to the table of a device in a folder; returns the file."""
    file = table_path(device, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with sidecar_lock(file):
        replace_entry(file, device, new)
    return file


def replace_entry(file: Path, device: str, new: Mapping[str, Any]) -> None:
    """Writes the table with the new entry in place of the old one of its implementation."""
    old_entries = read_table(file)["entries"] if file.exists() else []
    kept = [e for e in old_entries if (e["op"], e["impl"]) != (new["op"], new["impl"])]
    entries = sorted([*kept, new], key=lambda e: (e["op"], e["impl"]))
    new_file = file.with_suffix(".new")
    body = ",\n".join(map(format_entry, entries))
    chosen = ",\n".join(f" {json.dumps(op)}: {json.dumps(choice)}" for op, choice in choose_impls(entries).items())
    head = f'"device": {json.dumps(device)}, ' + (chosen and f'"choices": {{\n{chosen}\n}}, ')
    new_file.write_text(f'{{{head}"entries": [\n{body}\n]}}\n')
    new_file.replace(file)


def format_entry(entry: Mapping[str, Any]) -> str:
    """Returns the text of an entry, a line for each range."""
    head = ",\n".join(
        f" {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items() if k not in ("ranges", "otherwise")
    )
    lines = ",\n".join(f"  {json.dumps(r)}" for r in entry["ranges"])
    return f'{{\n{head},\n "ranges": [\n{lines}\n ],\n "otherwise": {json.dumps(entry["otherwise"])}\n}}'


def regret_report(rows: Sequence[Row], default_config: Config, varying: Sequence[str]) -> Iterator[str]:
    """Yields a table: for each tuned size the time of configs[0] and of the tuned config, and the regret of three
    choices: configs[0], what the table would say without this size (how far to trust it in between), and the fallback.
    """
    points, default = tuned_points(rows), canonical_json(dict(default_config))
    fallback = canonical_json(fallback_config(points, gated_configs(rows))["config"])
    names = [name for name in points[0].sizes if name in varying or len({p.sizes[name] for p in points}) > 1]
    width = 2 + max(len(" ".join(f"{n}={p.sizes[n]}" for n in names)) for p in points)
    yield f"{'':{width}}{'configs[0]':>12}{'tuned':>12}   regret: configs[0]  neighbour  otherwise   tuned config"
    regrets: list[tuple[float, ...]] = []
    for point in points:
        other_ranges = table_ranges([p for p in points if p is not point], varying)
        neighbor = canonical_json(
            config_for_sizes({"ranges": other_ranges, "otherwise": {"config": json.loads(fallback)}}, point.sizes)
        )
        regrets.append(tuple(point.regret(config) for config in (default, neighbor, fallback)))
        sizes = " ".join(f"{n}={point.sizes[n]}" for n in names)
        times = [format_seconds(point.seconds[c]) if c in point.seconds else "-" for c in (default, point.best)]
        shares = "".join(f"{'-' if r == inf else f'{r:.2f}':>11}" for r in regrets[-1])
        yield f"{sizes:{width}}{times[0]:>12}{times[1]:>12}        {shares}   {format_config(json.loads(point.best))}"
    known = [[r for r in column if r != inf] for column in zip(*regrets)]
    for word, summary in (("worst", max), ("mean", fmean)):
        yield f"{word:{width + 32}}" + "".join(f"{f'{summary(k):.2f}' if k else '-':>11}" for k in known)
    if unknown := sum(r == inf for regret in regrets for r in regret):
        yield f"- where a config has no time: {unknown} of {3 * len(points)}, left out of worst and mean"
