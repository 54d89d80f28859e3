"""The table of `bench.emulate --table`: every kernel's counters, then each access that is marked."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...measure.format import format_config
from .sums import MAX_SECTORS, MAX_WAVEFRONTS
from .text import EmulatedCall, format_per_unit, format_sector_counts, format_wavefronts, is_marked, ratio, source_text

Row = Mapping[str, Any]
INTRODUCTION = """
`python -m bench.emulate --table FILE`, commit {commit}, {date}, Triton {triton}. Sizes are those of
configs/bench/emulate.toml, arguments random and aligned. Instructions are PTX, those of all threads for each unit of
the call's work. Sectors stand beside the fewest that could hold the bytes of a request. Bytes are those of the sectors
of all kernels of a call, and tensor-core FLOPs those of all of them, both as multiples of what the op needs. **Bold**:
an access of the kernel has more than {max_wavefronts} wavefronts, or {max_sectors} of its fewest sectors; it stands in
the second table.
"""


def counters_table(calls: Sequence[EmulatedCall], stamp: Mapping[str, str]) -> Iterator[str]:
    """Yields the lines of the table, as Markdown."""
    kernels = [row for call in calls for row in call.rows]
    marked = sum(any(map(is_marked, row["memory"])) for row in kernels)
    yield "# What the default configs do, emulated"
    yield INTRODUCTION.format(**stamp, max_wavefronts=MAX_WAVEFRONTS, max_sectors=MAX_SECTORS)
    yield f"{len(kernels)} kernels of {sum(bool(call.rows) for call in calls)} calls, {marked} with a marked access."
    yield ""
    names = ["op", "implementation", "config", "target", "kernel"]
    numbers = ["instructions a unit", "sectors a request", "wavefronts an access", "bytes", "tensor-core FLOPs"]
    yield from table_head(names, numbers)
    for call in calls:
        moved = sum(row["read_bytes"] + row["written_bytes"] for row in call.rows)
        flops = sum(row["tensor_flops"] for row in call.rows)
        for i, row in enumerate(call.rows):
            of_call = ["", ""]
            if not i:
                work = f"{ratio(flops, row['op_flops']):.2f}" if flops else "-"
                of_call = [f"{ratio(moved, row['op_bytes']):.2f}", work]
            yield table_line([*kernel_cells(row), *of_call])
    if marked:
        yield from marked_accesses(kernels)
    refused = Counter(f"{call.request.op} {call.request.impl}: {call.reason}" for call in calls if not call.rows)
    if refused:
        yield ""
        yield "Calls that were not emulated:"
        yield ""
    for refusal, count in refused.items():
        yield f"- {count} of {refusal}"


def kernel_cells(row: Row) -> list[str]:
    """Returns the cells of a kernel, without those of its call."""
    sectors, wavefronts = format_sector_counts(row), format_wavefronts(row)
    if any(ratio(x["sectors"], x["fewest_sectors"]) > MAX_SECTORS for x in row["memory"]):
        sectors = f"**{sectors}**"
    if any(ratio(x["wavefronts"], x["accesses"]) > MAX_WAVEFRONTS for x in row["memory"]):
        wavefronts = f"**{wavefronts}**"
    return [*call_cells(row), format_per_unit(row), sectors, wavefronts]


def call_cells(row: Row) -> list[str]:
    """Returns the cells that name a kernel."""
    kv = f" {row['sizes']['kv']}" if row["sizes"].get("kv", "plain") != "plain" else ""
    config = f"{row['number']}: {format_config(row['config'])}"
    return [row["op"] + kv, row["impl"], config, row["target"], f"`{row['kernel']}`"]


def marked_accesses(kernels: Sequence[Row]) -> Iterator[str]:
    """Yields the table of all marked accesses, those of one kernel together."""
    yield ""
    names = ["op", "implementation", "config", "target", "line", "source", "access"]
    yield from table_head(names, ["sectors a request", "wavefronts an access"])
    for row in kernels:
        for x in filter(is_marked, row["memory"]):
            text = source_text(x["source"])[:70].replace("|", "\\|")
            *names, _ = call_cells(row)
            source = f"`{text}`" if text else ""
            yield table_line(
                [*names, x["source"], source, f"`{x['opcode']}`", format_sector_counts(x), format_wavefronts(x)]
            )


def table_line(cells: Sequence[str]) -> str:
    """Returns a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_head(names: Sequence[str], numbers: Sequence[str]) -> Iterator[str]:
    """Yields the head of a Markdown table whose last columns are numbers."""
    yield table_line([*names, *numbers])
    yield f"|{'---|' * len(names)}{'--:|' * len(numbers)}"
