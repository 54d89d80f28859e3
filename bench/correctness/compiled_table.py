"""The results of `python -m bench.compiled_check` as a document."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from ..measure.rows import ROOT, STAMP
from .compiled_cell import Cell

Rows = Mapping[Cell, Mapping[str, Any]]


def table(results: Rows) -> str:
    """The document: counts for each implementation and target, failures, and the blocks that were never entered."""
    return "\n".join([*head(results), *counts(results), *failures(results), *never_entered(results)]) + "\n"


def head(results: Rows) -> Iterator[str]:
    """The number of cells, their seconds and versions."""
    cpu = sum(row["cpu_seconds"] for row in results.values())
    compiling = sum(row["compile_seconds"] for row in results.values())
    stamps = {", ".join(f"{name} {row[name]}" for name in STAMP if name != "device") for row in results.values()}
    yield "# Every kernel as compiled, in the emulator"
    yield ""
    yield "Written by `python -m bench.compiled_check --table bench/results/compiled-check.md`."
    yield f"{len(results)} cells of a config and a target, {sum(row['examples'] for row in results.values())} examples,"
    yield f"{cpu:.0f} seconds of one CPU in all; {compiling:.0f} seconds passed while kernels were compiled."
    yield ""
    yield from sorted(stamps)
    yield ""


def counts(results: Rows) -> Iterator[str]:
    """A line for each implementation and target."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for cell, row in sorted(results.items(), key=lambda x: str(x[0])):
        groups[cell.op, cell.impl, cell.target].append(row)
    columns = ("configs", "examples", "kernels", "blocks", "never entered", "mma", "wgmma", "wrong", "CPU s")
    yield f"| op | implementation | target | {' | '.join(columns)} |"
    yield f"|---|---|---|{'--:|' * len(columns)}"
    for (op, impl, target), group in groups.items():
        kernels = [kernel for row in group for kernel in row["kernels"]]
        missing = sum(len(kernel["missing"]) for kernel in kernels)
        products = [sum(row["matrix_products"].get(x, 0) for row in group) for x in ("mma", "wgmma")]
        numbers = [
            *(len(group), sum(row["examples"] for row in group), len(kernels), sum(x["blocks"] for x in kernels)),
            *(missing, *products, sum(len(row["wrong"]) for row in group)),
        ]
        seconds = sum(row["cpu_seconds"] for row in group)
        yield f"| {op} | {impl} | {target} | {' | '.join(str(n or '') for n in numbers)} | {seconds:.0f} |"
    yield ""


def failures(results: Rows) -> Iterator[str]:
    """All that is wrong, and all that is unsupported."""
    wrong = [(cell, failure) for cell, row in results.items() for failure in row["wrong"]]
    yield "## Wrong" if wrong else "Nothing is wrong."
    yield ""
    for cell, failure in wrong:
        yield f"- {cell}: {failure['kind']}: {failure['text'].splitlines()[0]} ({failure['call']})"
    if unsupported := Counter(reason for row in results.values() for reason in row["unsupported"]):
        yield ""
        yield "Unsupported, so that other examples were drawn, or none:"
        yield ""
        yield from (f"- {reason} ({count} cells)" for reason, count in sorted(unsupported.items()))
    yield ""


def never_entered(results: Rows) -> Iterator[str]:
    """A line for each source line: how many compiled kernels have a block there that no example entered."""
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for cell, row in results.items():
        for kernel in row["kernels"]:
            for source in kernel["missing"]:
                found[kernel["kernel"], source.removeprefix(f"{ROOT}/")][cell.target] += 1
    yield "## Blocks that no example entered" if found else "Every basic block was entered."
    if found:
        yield ""
        yield "Line 0 is code that the compiler gave none. Many are ways around a loop that always runs."
        yield ""
        yield "| kernel | begins at | compiled kernels |"
        yield "|---|---|---|"
        for (kernel, source), targets in sorted(found.items()):
            yield f"| {kernel} | {source} | {', '.join(f'{n} for {x}' for x, n in sorted(targets.items()))} |"
