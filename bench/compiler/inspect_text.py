"""What `inspect` found, as text: a table of kernels, one of their loops, and what differs between two."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compiled import Call, Outcome
from .kernel_stats import Dissection

FIGURES = ("registers", "spills", "shared", "blocks", "warps", "occupancy", "limit", "instructions", "per_unit")


@dataclass(frozen=True)
class Found:
    """A call and what came of it; each kernel it launched with its row. `source`: the commit, if it is not this one."""

    call: Call
    source: str
    outcome: Outcome[Dissection]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        source = f"{self.source}: " if self.source else ""
        return f"{source}{self.call.impl} {self.call.config} {self.call.target}"


def refusals(found: Sequence[Found]) -> Iterator[str]:
    for x in found:
        if not x.rows:
            why = x.outcome.error or x.outcome.unsupported or "launches no Triton kernel for these sizes"
            yield f"{x.call.op} {x.name}: {'ERROR ' if x.outcome.error else ''}{why.splitlines()[0]}"


def table(found: Sequence[Found]) -> Iterator[str]:
    """One line a kernel: what it takes, and the main loop's tensor-core instructions, loads and stores; where some are
    of 4-bit weights, which of the loads these are.
    """
    columns = ["kernel", "registers", "spills", "shared", "blocks", "warps", "of most", "limit"]
    weights = any(row["loops"][0]["weight_loads"] for x in found for row in x.rows)
    kinds = ("tensor", "weight_loads") if weights else ("tensor",)
    lines = []
    for x in found:
        for row in x.rows:
            loop = row["loops"][0]
            takes = [row["kernel"], row["registers"], row["spills"], row["shared"], row["blocks"], row["warps"]]
            opcodes = (words(loop[name]) for name in (*kinds, "loads", "stores"))
            lines.append([x.name, *takes, f"{row['occupancy']:.0%}", row["limit"], *opcodes])
    names = ["tensor core", "of weights", "all loads"] if weights else ["tensor core", "loads"]
    yield from aligned([["impl, config, arch", *columns, *names, "stores"], *lines])


def mixtures(found: Sequence[Found]) -> Iterator[str]:
    """One line a working loop, the main one first: instructions of a thread by kind, and what they come to for each
    weight or score."""
    loops = [(x.name, row["unit"], loop) for x in found for row in x.rows for loop in row["loops"]]
    kinds = list(dict.fromkeys(kind for *_, loop in loops for kind in loop["mix"]))
    lines = []
    for name, unit, loop in loops:
        where = f"{loop['where']} (no loop)" if loop["whole"] else loop["where"]
        mix = [loop["mix"].get(kind, 0) for kind in kinds]
        known = f"{loop['per_unit']:.2f}" if loop["per_unit"] else "?"
        lines.append([name, where, *mix, loop["instructions"], f"{known} a {unit}" if unit else "-"])
    yield from aligned([["instructions of a thread", "lines", *kinds, "all", "of the block"], *lines])


def spelled(sizes: Sequence[Mapping[str, Any]]) -> str:
    """The sizes of several calls, those that differ with all their values: m=1/16 n=4096."""
    values = {name: dict.fromkeys(str(x[name]) for x in sizes) for name in sizes[0]}
    return " ".join(f"{name}={'/'.join(found)}" for name, found in values.items())


def words(counts: Mapping[str, int]) -> str:
    return " ".join(f"{n}x{name}" for name, n in counts.items()) or "-"


def aligned(lines: Sequence[Sequence[Any]]) -> Iterator[str]:
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = (f"{x:>{w}}" if isinstance(x, int) else f"{x:<{w}}" for x, w in zip(line, widths))
        yield "  ".join(cells).rstrip()


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row by one name each, the main loop's among them."""
    loop = row["loops"][0]
    found = {f"config {k}": v for k, v in row["config"].items()} | {k: row[k] for k in FIGURES}
    found |= {"loop instructions": loop["instructions"], "loop turns": loop["turns"]}
    for part in ("mix", "tensor", "loads", "stores", "shared"):
        found |= {f"loop {name}": n for name, n in loop[part].items()}
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(figure, old, new) of all that differs; a count that is missing is 0."""
    before, after = flat(old), flat(new)
    for name in {**before, **after}:
        missing = 0 if name.startswith("loop ") else "-"
        a, b = before.get(name, missing), after.get(name, missing)
        if a != b:
            yield name, rounded(a), rounded(b)


def rounded(x: Any) -> Any:
    return round(x, 3) if isinstance(x, float) else x


def compare(old: Sequence[Found], new: Sequence[Found], label: str) -> Iterator[str]:
    """The differences of every pair of calls, kernel by kernel in the order of launch."""
    for a, b in zip(old, new, strict=True):
        yield f"\n{b.call.op} {b.name}, compared with {label}:"
        if len(a.rows) != len(b.rows) or not b.rows:
            yield from (f"  {x}" for x in refusals([a, b]))
            yield f"  kernels launched: {len(a.rows)} -> {len(b.rows)}"
        for before, after in zip(a.rows, b.rows):
            lines = [[f"  {name}", f"{x} -> {y}"] for name, x, y in differences(before, after)]
            yield from aligned(lines) if lines else ["  no difference"]
