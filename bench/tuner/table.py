"""From the journal of a search to its entry in a tuned table (`vila_triton.registry.tuned_tables`), and what the choice costs.

The same rows give the same bytes, in whatever order they were found. A range of a size that varies ends at the
geometric mean of two neighbouring sizes that were tuned; the first begins at 0 and the last has no end. With several
varying sizes the ranges of the second lie within one of the first, and so on: every size lies in exactly one range.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import inf, isqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from vila_triton.files.file_locks import alone
from vila_triton.registry import OPS, REFERENCE
from vila_triton.registry.kernel_config import configured
from vila_triton.registry.search_space import Config, canonical
from vila_triton.registry.size_ranges import Choice, Within, joined, name_at
from vila_triton.registry.tuned_tables import file_of, pick, read

from ..measure.format import brief, unit

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """Sizes that were tuned, and the seconds of each config there, by the config's canonical text."""

    sizes: Mapping[str, Any]
    seconds: Mapping[str, float]

    @property
    def best(self) -> str:
        return min(self.seconds, key=lambda config: (self.seconds[config], config))

    def regret(self, config: str) -> float:
        """How many times as long as the best a config takes; infinite if it has no time here."""
        return self.seconds.get(config, inf) / self.seconds[self.best]


TIMES = ("timed", "predicted")  # the second: by the cost model, and nobody looked whether it is right


def points(rows: Iterable[Row]) -> list[Point]:
    """What has a time, by sizes."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["status"] in TIMES:
            found.setdefault(canonical(row["sizes"]), {})[canonical(row["config"])] = row["seconds"]
    return [Point(json.loads(sizes), found[sizes]) for sizes in sorted(found)]


def split(at: Sequence[Point], varying: Sequence[str]) -> Iterator[tuple[dict[str, Any], Point]]:
    """The ranges around points that differ in the varying sizes only."""
    if not varying:
        yield {}, at[0]
        return
    name, *rest = varying
    values = sorted({p.sizes[name] for p in at})
    for before, value, after in zip([None, *values], values, [*values[1:], None]):
        first = 0 if before is None else isqrt(before * value) + 1
        last = None if after is None else isqrt(value * after)
        for ranges, point in split([p for p in at if p.sizes[name] == value], rest):
            yield {name: [first, last], **ranges}, point


def ranges(at: Sequence[Point], varying: Sequence[str]) -> list[dict[str, Any]]:
    """The ranges of a table: for each set of fixed sizes that was tuned, those of the varying ones."""
    groups: dict[str, list[Point]] = {}
    for point in at:
        groups.setdefault(canonical({k: v for k, v in point.sizes.items() if k not in varying}), []).append(point)
    found = []
    for fixed in sorted(groups):
        for around, point in split(groups[fixed], varying):
            tuned_at = {name: point.sizes[name] for name in varying}
            best = {"config": json.loads(point.best), "seconds": point.seconds[point.best]}
            found.append({"sizes": {**json.loads(fixed), **around}, "tuned_at": tuned_at, **best})
    return found


def otherwise(at: Sequence[Point], right: Set[str]) -> dict[str, Any]:
    """Of the configs that passed the gate that with times at most sizes, and of those with the least worst regret."""
    missing, worst, config = least(at, right)
    return {"config": json.loads(config), "worst_regret": worst, "sizes_without_time": missing}


def gated(rows: Iterable[Row]) -> set[str]:
    """The configs that passed the gate, by their canonical text."""
    return {canonical(row["config"]) for row in rows if row["status"] == "timed"}


def least(at: Sequence[Point], among: Set[str] | None = None) -> tuple[int, float, str]:
    """(sizes without a time, worst regret, config) of the config for which they are least."""
    every = {c for point in at for c in point.seconds if among is None or c in among}
    missing = {c: sum(c not in p.seconds for p in at) for c in every}
    worst = {c: max(p.regret(c) for p in at if c in p.seconds) for c in missing}
    return min((missing[c], worst[c], c) for c in missing)


def usual(op: str, size: int) -> set[str]:
    """What configs/kernels.toml runs at this size on a GPU, in either phase."""
    return {name_at(configured("cuda", phase).get(op, REFERENCE), size) for phase in ("prefill", "decode")}


def choice(op: str, entries: Iterable[Row]) -> Within | None:
    """Which implementation of an op is to run, by the size that varies, from the entries of several.

    Sizes count at which what configs/kernels.toml runs was timed, too: a search that was ended early may know nothing
    else of the others but that they can be run. For each value it is the one timed at most of the sizes that go with
    it, and of those the one with the least worst regret; ranges meet where those of configs do. It holds from the
    first to the last value; None if no size counts.
    """
    varying = OPS[op].varying[0]
    seconds: dict[str, dict[str, float]] = {}
    for of in entries:
        for r in of["ranges"]:
            seconds.setdefault(canonical({**r["sizes"], **r["tuned_at"]}), {})[of["impl"]] = r["seconds"]
    at = [Point(json.loads(sizes), found) for sizes, found in seconds.items()]
    at = [p for p in at if usual(op, p.sizes[varying]) <= p.seconds.keys()]
    if not at:
        return None
    values = sorted({p.sizes[varying] for p in at})
    best = [least([p for p in at if p.sizes[varying] == value])[2] for value in values]
    pieces = [(isqrt(value * after), name) for value, after, name in zip(values, values[1:], best)]
    return Within(values[0], values[-1], joined(pieces, best[-1]))


def choices(entries: Sequence[Row]) -> dict[str, Any]:
    """The choices of a table, by op, for the ops of which it has several entries."""
    ops = sorted({e["op"] for e in entries if e["op"] in OPS and OPS[e["op"]].varying})
    of = {op: [e for e in entries if e["op"] == op] for op in ops}
    within = {op: choice(op, of[op]) for op in ops if len(of[op]) > 1}
    return {op: {"first": w.first, "last": w.last, "choice": plain(w.choice)} for op, w in within.items() if w}


def plain(choice: Choice) -> Any:
    """A choice as it stands in a file."""
    if isinstance(choice, str):
        return choice
    return [*map(list, zip(choice.ends, choice.names)), choice.names[-1]]


def entry(search: Row, rows: Sequence[Row], varying: Sequence[str]) -> dict[str, Any] | None:
    """The entry of a search; None as long as nothing was timed."""
    at = points(rows)
    if not at:
        return None
    statuses = [row["status"] for row in rows]
    last = max(rows, key=lambda row: (row["date"], row["commit"]))
    return {
        **{key: value for key, value in search.items() if key not in ("kind", "device")},
        **{key: last[key] for key in ("date", "commit", "torch")},
        "candidates": {status: statuses.count(status) for status in ("cost", "compile", "gate", *TIMES)},
        "ranges": ranges(at, varying),
        "otherwise": otherwise(at, gated(rows)),
    }


def write(folder: Path, device: str, new: Mapping[str, Any]) -> Path:
    """Put an entry into the table of a device, in place of the one it had for that implementation; the choices are
    made anew. Others may write to the table at the same time.
    """
    file = file_of(device, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(file):
        put(file, device, new)
    return file


def put(file: Path, device: str, new: Mapping[str, Any]) -> None:
    held = read(file)["entries"] if file.exists() else []
    kept = [e for e in held if (e["op"], e["impl"]) != (new["op"], new["impl"])]
    entries = sorted([*kept, new], key=lambda e: (e["op"], e["impl"]))
    whole = file.with_suffix(".new")
    body = ",\n".join(map(text, entries))
    chosen = ",\n".join(f" {json.dumps(op)}: {json.dumps(found)}" for op, found in choices(entries).items())
    head = f'"device": {json.dumps(device)}, ' + (chosen and f'"choices": {{\n{chosen}\n}}, ')
    whole.write_text(f'{{{head}"entries": [\n{body}\n]}}\n')
    whole.replace(file)


def text(of: Mapping[str, Any]) -> str:
    """An entry with a line for each range."""
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in of.items() if k not in ("ranges", "otherwise"))
    lines = ",\n".join(f"  {json.dumps(r)}" for r in of["ranges"])
    return f'{{\n{head},\n "ranges": [\n{lines}\n ],\n "otherwise": {json.dumps(of["otherwise"])}\n}}'


def report(rows: Sequence[Row], default: Config, varying: Sequence[str]) -> Iterator[str]:
    """For each tuned size the time of configs[0] and of the tuned config, and what three choices cost beside the best:
    configs[0], what the table without this size would say (so, how far to trust it in between), and `otherwise`.
    """
    at, first = points(rows), canonical(dict(default))
    rest = canonical(otherwise(at, gated(rows))["config"])
    names = [name for name in at[0].sizes if name in varying or len({p.sizes[name] for p in at}) > 1]
    width = 2 + max(len(" ".join(f"{n}={p.sizes[n]}" for n in names)) for p in at)
    yield f"{'':{width}}{'configs[0]':>12}{'tuned':>12}   regret: configs[0]  neighbour  otherwise   tuned config"
    regrets: list[tuple[float, ...]] = []
    for point in at:
        others = ranges([p for p in at if p is not point], varying)
        near = canonical(pick({"ranges": others, "otherwise": {"config": json.loads(rest)}}, point.sizes))
        regrets.append(tuple(point.regret(config) for config in (first, near, rest)))
        sizes = " ".join(f"{n}={point.sizes[n]}" for n in names)
        times = [unit(point.seconds[c]) if c in point.seconds else "-" for c in (first, point.best)]
        shares = "".join(f"{'-' if r == inf else f'{r:.2f}':>11}" for r in regrets[-1])
        yield f"{sizes:{width}}{times[0]:>12}{times[1]:>12}        {shares}   {brief(json.loads(point.best))}"
    known = [[r for r in column if r != inf] for column in zip(*regrets)]
    for word, summary in (("worst", max), ("mean", fmean)):
        yield f"{word:{width + 32}}" + "".join(f"{f'{summary(k):.2f}' if k else '-':>11}" for k in known)
    if unknown := sum(r == inf for regret in regrets for r in regret):
        yield f"- where a config has no time: {unknown} of {3 * len(at)}, left out of worst and mean"
