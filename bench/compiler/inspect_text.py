"""The text of `bench.inspect`: a table of kernels, a table of their loops, and the differences between two kernels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cross_compile import CompileRequest, CompileResult
from .kernel_stats import KernelAnalysis

STATS = ("registers", "spills", "shared", "blocks", "warps", "occupancy", "limit", "instructions", "per_unit")


@dataclass(frozen=True)
class InspectedCall:
    """A request, its result, and a row for each kernel it launched. `source`: the commit, if it is another than this
    one.
    """

    request: CompileRequest
    source: str
    result: CompileResult[KernelAnalysis]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        source = f"{self.source}: " if self.source else ""
        return f"{source}{self.request.impl} {self.request.config} {self.request.target}"


def refusal_lines(inspected: Sequence[InspectedCall]) -> Iterator[str]:
    """Yields a line for each call that launched no kernel, with the reason."""
    for x in inspected:
        if not x.rows:
            reason = x.result.error or x.result.unsupported or "launches no Triton kernel for these sizes"
            yield f"{x.request.op} {x.name}: {'ERROR ' if x.result.error else ''}{reason.splitlines()[0]}"


def kernel_table(inspected: Sequence[InspectedCall]) -> Iterator[str]:
    """Yields a line per kernel: its resources, and the tensor-core instructions, loads and stores of the main loop. If
    some kernels load 4-bit weights, a column tells which of the loads these are.
    """
    columns = ["kernel", "registers", "spills", "shared", "blocks", "warps", "of most", "limit"]
    weights = any(row["loops"][0]["weight_loads"] for x in inspected for row in x.rows)
    kinds = ("tensor", "weight_loads") if weights else ("tensor",)
    lines = []
    for x in inspected:
        for row in x.rows:
            loop = row["loops"][0]
            usage = [row["kernel"], row["registers"], row["spills"], row["shared"], row["blocks"], row["warps"]]
            opcodes = (format_counts(loop[name]) for name in (*kinds, "loads", "stores"))
            lines.append([x.name, *usage, f"{row['occupancy']:.0%}", row["limit"], *opcodes])
    names = ["tensor core", "of weights", "all loads"] if weights else ["tensor core", "loads"]
    yield from format_table([["impl, config, arch", *columns, *names, "stores"], *lines])


def instruction_mix_table(inspected: Sequence[InspectedCall]) -> Iterator[str]:
    """Yields a line per main loop: instructions of a thread by kind, and their number per weight or score."""
    loops = [(x.name, row["unit"], loop) for x in inspected for row in x.rows for loop in row["loops"]]
    kinds = list(dict.fromkeys(kind for *_, loop in loops for kind in loop["mix"]))
    lines = []
    for name, unit, loop in loops:
        where = f"{loop['where']} (no loop)" if loop["whole"] else loop["where"]
        mix = [loop["mix"].get(kind, 0) for kind in kinds]
        per_unit = f"{loop['per_unit']:.2f}" if loop["per_unit"] else "?"
        lines.append([name, where, *mix, loop["instructions"], f"{per_unit} a {unit}" if unit else "-"])
    yield from format_table([["instructions of a thread", "lines", *kinds, "all", "of the block"], *lines])


def format_sizes(sizes: Sequence[Mapping[str, Any]]) -> str:
    """Returns the sizes of several calls, all values of those that differ: m=1/16 n=4096."""
    values = {name: dict.fromkeys(str(x[name]) for x in sizes) for name in sizes[0]}
    return " ".join(f"{name}={'/'.join(distinct)}" for name, distinct in values.items())


def format_counts(counts: Mapping[str, int]) -> str:
    """Returns counts as one text: 4xLDG.128 2xLDS."""
    return " ".join(f"{n}x{name}" for name, n in counts.items()) or "-"


def format_table(lines: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Yields the lines of a table with aligned columns, integers to the right."""
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = (f"{x:>{w}}" if isinstance(x, int) else f"{x:<{w}}" for x, w in zip(line, widths))
        yield "  ".join(cells).rstrip()


def flatten_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of a row under one name each, those of the main loop among them."""
    loop = row["loops"][0]
    figures = {f"config {k}": v for k, v in row["config"].items()} | {k: row[k] for k in STATS}
    figures |= {"loop instructions": loop["instructions"], "loop turns": loop["turns"]}
    for group in ("mix", "tensor", "loads", "stores", "shared"):
        figures |= {f"loop {name}": n for name, n in loop[group].items()}
    return figures


def row_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (figure, old, new) for all that differs; a count that is missing is 0."""
    flat_old, flat_new = flatten_row(old), flatten_row(new)
    for name in {**flat_old, **flat_new}:
        missing = 0 if name.startswith("loop ") else "-"
        a, b = flat_old.get(name, missing), flat_new.get(name, missing)
        if a != b:
            yield name, round_float(a), round_float(b)


def round_float(x: Any) -> Any:
    """Rounds a float to three decimals and leaves everything else as it is."""
    return round(x, 3) if isinstance(x, float) else x


def compare_calls(old: Sequence[InspectedCall], new: Sequence[InspectedCall], label: str) -> Iterator[str]:
    """Yields the differences of each pair of calls, kernel by kernel in the order of launch."""
    for a, b in zip(old, new, strict=True):
        yield f"\n{b.request.op} {b.name}, compared with {label}:"
        if len(a.rows) != len(b.rows) or not b.rows:
            yield from (f"  {x}" for x in refusal_lines([a, b]))
            yield f"  kernels launched: {len(a.rows)} -> {len(b.rows)}"
        for old_row, new_row in zip(a.rows, b.rows):
            lines = [[f"  {name}", f"{x} -> {y}"] for name, x, y in row_differences(old_row, new_row)]
            yield from format_table(lines) if lines else ["  no difference"]
