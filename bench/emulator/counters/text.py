"""The text of `bench.emulate`: what each kernel did beside what it had to, and the differences of two calls."""

import linecache
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vila_triton import kernels as kernels_package

from ...compiler.cross_compile import CompileRequest
from ...compiler.inspect_text import format_table, round_float
from .emulated_call import instructions_per_unit
from .sums import MAX_SECTORS, MAX_WAVEFRONTS

Row = Mapping[str, Any]


@dataclass(frozen=True)
class EmulatedCall:
    """A request, the commit of its kernels if that is another than this one, a row for each kernel it launched, and the
    reason if there is none.
    """

    request: CompileRequest
    source: str
    rows: list[dict[str, Any]]
    refusal: str
    is_error: bool

    @property
    def name(self) -> str:
        source = f"{self.source}: " if self.source else ""
        return f"{source}{self.request.impl} {self.request.config} {self.request.target}"

    @property
    def reason(self) -> str:
        """The first line of the reason why there is no row."""
        return self.refusal.splitlines()[0] if self.refusal else "launches no Triton kernel for these sizes"


def format_bytes(count: float) -> str:
    """Returns bytes in the unit that suits them."""
    scale, name = next((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")) if count >= s)
    return f"{count / (scale or 1):.3g} {name}"


def ratio(part: float, whole: float) -> float:
    """Returns part / whole, or 1 where both are nothing."""
    return part / whole if whole else 1.0 if not part else float("inf")


def format_per_unit(row: Row) -> str:
    """Returns the instructions of all threads for each unit of work: 5.9 a weight."""
    article = "an" if row["unit"] == "element" else "a"
    return f"{instructions_per_unit(row):.3g} {article} {row['unit']}"


def format_sector_counts(row: Row) -> str:
    """Returns sectors a request and the fewest that could hold its bytes; "-" without requests."""
    if not row["requests"]:
        return "-"
    return f"{row['sectors'] / row['requests']:.2f} of {row['fewest_sectors'] / row['requests']:.2f}"


def format_wavefronts(row: Row) -> str:
    """Returns wavefronts an access; "-" without accesses."""
    return f"{row['wavefronts'] / row['accesses']:.2f}" if row["accesses"] else "-"


def is_marked(row: Row) -> bool:
    """Returns whether an access has more sectors than `MAX_SECTORS`, or more wavefronts than `MAX_WAVEFRONTS`,
    allows.
    """
    too_many_sectors = ratio(row["sectors"], row["fewest_sectors"]) > MAX_SECTORS
    return too_many_sectors or ratio(row["wavefronts"], row["accesses"]) > MAX_WAVEFRONTS


def kernel_table(calls: Sequence[EmulatedCall]) -> Iterator[str]:
    """Yields a line per kernel: instructions for each unit of work, sectors a request, wavefronts an access, bytes and
    tensor-core work.
    """
    lines = [["impl, config, target", "kernel", "grid", "instructions", "sectors a request", "wavefronts an access"]]
    lines[0] += ["read", "written", "tensor-core FLOPs"]
    for call in calls:
        for row in call.rows:
            moved = format_bytes(row["read_bytes"]), format_bytes(row["written_bytes"])
            flops = f"{row['tensor_flops']:.3g}" if row["tensor_flops"] else "-"
            grid = "x".join(map(str, row["grid"]))
            line = [
                call.name,
                row["kernel"],
                grid,
                format_per_unit(row),
                format_sector_counts(row),
                format_wavefronts(row),
            ]
            lines.append([*line, *moved, flops])
    yield from format_table(lines)


def total_lines(calls: Sequence[EmulatedCall]) -> Iterator[str]:
    """Yields a line per call: the bytes and the tensor-core work of all its kernels beside those of the op, whose cost
    takes every sequence of a batch to be as long as the longest.
    """
    for call in calls:
        if call.rows:
            moved = sum(row["read_bytes"] + row["written_bytes"] for row in call.rows)
            flops, must_move = sum(row["tensor_flops"] for row in call.rows), call.rows[0]["op_bytes"]
            yield (
                f"{call.name}: moves {format_bytes(moved)}, {ratio(moved, must_move):.2f} of the "
                f"{format_bytes(must_move)} that must move; tensor cores do "
                f"{ratio(flops, call.rows[0]['op_flops']):.2f} of the op's {call.rows[0]['op_flops']:.3g} FLOPs"
            )


def kind_table(calls: Sequence[EmulatedCall]) -> Iterator[str]:
    """Yields a line per kernel: the share of each kind of instructions."""
    kinds = list(dict.fromkeys(kind for call in calls for row in call.rows for kind in row["kinds"]))
    lines: list[list[Any]] = [["share of instructions", "kernel", *kinds, "all"]]
    for call in calls:
        for row in call.rows:
            shares = [f"{row['kinds'].get(kind, 0) / row['instructions']:.1%}" for kind in kinds]
            lines.append([call.name, row["kernel"], *shares, row["instructions"]])
    yield from format_table(lines)


@lru_cache
def source_text(source: str) -> str:
    """Returns the text of "file.py:12", if it is a file of kernels/."""
    file, _, line = source.rpartition(":")
    path = Path(kernels_package.__path__[0]) / Path(file).name
    return linecache.getline(str(path), int(line)).strip()


def access_table(calls: Sequence[EmulatedCall]) -> Iterator[str]:
    """Yields a line per access of memory: where it stands, what it is, sectors a request and wavefronts an access."""
    lines: list[list[Any]] = [["memory", "access", "requests", "sectors a request", "accesses", "wavefronts", ""]]
    for call in calls:
        for row in call.rows:
            lines.append([f"{call.name}, {row['kernel']}", *[""] * 6])
            for x in row["memory"]:
                mark = "!" if is_marked(x) else " "
                counts = [x["requests"], format_sector_counts(x), x["accesses"], format_wavefronts(x)]
                lines.append([f"{mark} {x['source']}", x["opcode"], *counts, source_text(x["source"])[:60]])
    yield from format_table(lines)


def line_table(calls: Sequence[EmulatedCall], count: int) -> Iterator[str]:
    """Yields the source lines of each kernel that have the most instructions, with their share and kinds."""
    lines: list[list[Any]] = [["lines with the most instructions", "share", "most of them", ""]]
    for call in calls:
        for row in call.rows:
            lines.append([f"{call.name}, {row['kernel']}", "", "", ""])
            for source, kinds in list(row["lines"].items())[:count]:
                share = f"{sum(kinds.values()) / row['instructions']:.1%}"
                lines.append([f"  {source}", share, ", ".join(list(kinds)[:2]), source_text(source)[:60]])
    yield from format_table(lines)


def refusal_lines(calls: Sequence[EmulatedCall]) -> Iterator[str]:
    """Yields a line for each call that launched no kernel, with the reason."""
    for call in calls:
        if not call.rows:
            reason = f"ERROR {call.refusal}" if call.is_error else call.reason
            yield f"{call.request.op} {call.name}: {reason}"


def figures(row: Row) -> dict[str, Any]:
    """Returns the figures of a row that two calls are compared by."""
    names = ("grid", "shared", "instructions", "read_bytes", "written_bytes", "tensor_flops")
    values = {name.replace("_", " "): row[name] for name in names}
    values |= {f"config {name}": value for name, value in row["config"].items()}
    values[f"instructions a {row['unit']}"] = instructions_per_unit(row)
    values["sectors of the fewest"] = ratio(row["sectors"], row["fewest_sectors"])
    values["wavefronts an access"] = ratio(row["wavefronts"], row["accesses"])
    return values | {f"instructions, {kind}": count for kind, count in row["kinds"].items()}


def compare_calls(old: Sequence[EmulatedCall], new: Sequence[EmulatedCall], label: str) -> Iterator[str]:
    """Yields the differences of each pair of calls, kernel by kernel in the order of launch."""
    for a, b in zip(old, new, strict=True):
        yield f"\n{b.request.op} {b.name}, compared with {label}:"
        yield from (f"  {line}" for line in refusal_lines([a, b]))
        if len(a.rows) != len(b.rows):
            yield f"  kernels launched: {len(a.rows)} -> {len(b.rows)}"
        for before, now in zip(a.rows, b.rows):
            x, y = figures(before), figures(now)
            names = [name for name in {**x, **y} if x.get(name, 0) != y.get(name, 0)]
            pairs = [(f"  {name}", round_float(x.get(name, 0)), round_float(y.get(name, 0))) for name in names]
            lines = [[name, f"{p} -> {q}", change(p, q)] for name, p, q in pairs]
            yield from format_table(lines) if lines else [f"  {now['kernel']}: no difference"]


def change(old: Any, new: Any) -> str:
    """Returns new / old of two numbers, if there is such a quotient."""
    numbers = isinstance(old, int | float) and isinstance(new, int | float)
    return f"x {new / old:.2f}" if numbers and old else ""
