"""One cell of `python -m bench.compiled_check`: a config of an implementation, compiled for a target, checked."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vila_triton.hashing import canonical_json, short_hash
from vila_triton.registry import OPS, Impl, Op, Unsupported
from vila_triton.registry.tuned_tables import kernel_hash

from ..emulator import Launch
from ..measure import rows
from . import repro_bundle
from .compiled_calls import compiled_for
from .compiled_plan import Sizes, draw_sizes, examples, other_choices, variations
from .error_budget import example_args
from .example_plan import planned_example
from .failure_report import exception_line, format_settings
from .guarded_memory import MemoryLayout, MismatchError

ATTEMPTS = 12  # at other choices and sizes, where some are unsupported
MAX_VARIATIONS = 12  # of an example, to enter blocks that it did not
MAX_SECONDS = 20  # of the processor, after which no more of them are run
MAX_WRONG = 3  # calls of a cell, after which no more are run


@dataclass(frozen=True)
class Cell:
    """The subject of one row. number: of the config."""

    op: str
    impl: str
    number: int
    target: str

    def __str__(self) -> str:
        return f"{self.op} {self.impl} {self.number} {self.target}"

    def resolve(self) -> tuple[Op, Impl, Mapping[str, Any]]:
        impl = OPS[self.op].impls[self.impl]
        return OPS[self.op], impl, impl.configs[self.number]

    def key(self) -> str:
        """A hash of what the result depends on, but for the emulator."""
        op, impl, config = self.resolve()
        plan = [Path(__file__), Path(__file__).with_name("compiled_plan.py"), *sorted(op.file.parent.glob("*.py"))]
        parts = kernel_hash(impl), canonical_json(dict(config)), self.target, rows.triton.__version__
        return short_hash(*(part.encode() for part in parts), *(file.read_bytes() for file in plan))


@dataclass
class BlocksEntered:
    """The basic blocks of every kernel that was compiled, and the warps that entered each."""

    programs: dict[int, Any] = field(default_factory=dict)  # by id
    entered: dict[int, Counter[int]] = field(default_factory=dict)

    def add(self, launches: list[Launch], only_known: bool) -> None:
        for launch in launches:
            if only_known and id(launch.program) not in self.programs:
                continue
            self.programs[id(launch.program)] = launch.program
            self.entered.setdefault(id(launch.program), Counter()).update(launch.entered)

    def missing(self, program: Any) -> tuple[str, ...]:
        """The source lines at which blocks of a program begin that were never entered. Empty blocks are none."""
        blocks = [block for block in program.kernel.blocks if block.instructions]
        entered = self.entered[id(program)]
        return tuple(block.instructions[0].source for block in blocks if not entered[block.index])

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"kernel": program.kernel.name, "blocks": count_blocks(program), "missing": self.missing(program)}
            for program in self.programs.values()
        ]


def count_blocks(program: Any) -> int:
    """The number of basic blocks that hold an instruction."""
    return sum(bool(block.instructions) for block in program.kernel.blocks)


@dataclass
class CellCheck:
    """The check of a cell as it runs."""

    cell: Cell
    bundles: Path
    blocks: BlocksEntered = field(default_factory=BlocksEntered)
    classes: Counter[str] = field(default_factory=Counter)
    checked: list[str] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    unsupported: set[str] = field(default_factory=set)
    compiling: float = 0.0
    given_up: set[tuple[str, str]] = field(default_factory=set)  # where blocks begin that no variation enters
    recompiled: set[str] = field(default_factory=set)  # what cannot be changed without compiling again
    useful: list[str] = field(default_factory=list)  # what was changed where that entered more

    def run(self, sizes: Sizes, layout: MemoryLayout, variation: bool = False) -> list[Launch]:
        """Check a call; what it launched, until it failed. Kernels that only a variation compiles count for no blocks.
        Errors: Unsupported.
        """
        op, impl, config = self.cell.resolve()
        example, report = planned_example(op, sizes), None
        try:
            with compiled_for(self.cell.target, impl, config) as report:
                example.check(impl, config, layout, example.call_twice and not variation)
        except Unsupported:
            raise
        except Exception as error:  # a kernel may fail in any way at all
            self.fail(sizes, layout, error)
        launches = report.launches if report else []
        self.blocks.add(launches, only_known=variation)
        self.compiling += report.compile_seconds if report else 0.0
        self.checked.append(f"{format_settings(sizes)} {layout}")
        for launch in launches:
            self.classes.update(matrix_products(launch))
        return launches

    def fail(self, sizes: Sizes, layout: MemoryLayout, error: Exception) -> None:
        op, impl, config = self.cell.resolve()
        file = repro_bundle.unused_path(self.bundles / f"{'-'.join(str(self.cell).split())}.bundle")
        drawn, seed = without_seed(sizes)
        repro_bundle.save(
            file, impl, config, example_args(op, **sizes), seed, layout, drawn, "compiled_check", self.cell.target
        )
        kind = error.kind if isinstance(error, MismatchError) else "crashed"
        text = str(error) if isinstance(error, MismatchError) else exception_line(error)
        call = f"{format_settings(sizes)} {layout}"
        self.wrong.append({"kind": kind, "call": call, "text": text[:2000], "bundle": str(file)})

    def run_first(self, row: dict[str, Any], sizes: str, seed: int) -> tuple[Sizes, MemoryLayout, list[Launch]] | None:
        """Run the first example of a dtype, layout and class of sizes that is supported; None if none is."""
        op, _, config = self.cell.resolve()
        for attempt in range(ATTEMPTS):
            choices = row if attempt == 0 else other_choices(op, row, 1000 * seed + attempt)
            drawn = draw_sizes(op, config, choices, sizes, seed + 100 * attempt)
            try:
                return drawn, choices["layout"], self.run(drawn, choices["layout"])
            except Unsupported as reason:
                self.unsupported.add(f"{row['dtype']}: {reason}")
        return None

    def enter_more(self, sizes: Sizes, layout: MemoryLayout, launches: list[Launch], end: float) -> None:
        """Run variations of an example until every block of what it launched is entered, or none is left."""
        op, _, config = self.cell.resolve()
        ordered = sorted(variations(op, config, sizes), key=lambda x: x[0] not in self.useful)
        for what, changed in ordered[:MAX_VARIATIONS]:
            before = self.missing(launches)
            if time.process_time() > end or len(self.wrong) >= MAX_WRONG or not before - self.given_up:
                return
            if what in self.recompiled:
                continue
            try:
                ran = self.run(changed, layout, variation=True)
            except Unsupported:
                continue
            if not any(id(launch.program) in self.blocks.programs for launch in ran):
                self.recompiled.add(what)
            if self.missing(launches) < before and what not in self.useful:
                self.useful.append(what)
        self.given_up |= self.missing(launches)

    def missing(self, launches: list[Launch]) -> set[tuple[str, str]]:
        """The source lines at which blocks begin that no warp entered, with their kernel."""
        return {(x.kernel, source) for x in launches for source in self.blocks.missing(x.program)}


def matrix_products(launch: Launch) -> Counter[str]:
    """The number of instructions of tensor cores that warps ran, by opcode."""
    blocks = launch.program.kernel.blocks
    return Counter(
        {
            opcode: count * launch.entered[block.index]
            for block in blocks
            for opcode, count in Counter(x.opcode for x in block.instructions).items()
            if opcode in ("mma", "wgmma")
        }
    )


def without_seed(sizes: Sizes) -> tuple[Sizes, int]:
    """The sizes without their seed, and it."""
    drawn = dict(sizes)
    return drawn, drawn.pop("seed")


def check_cell(work: tuple[Cell, Path, Path]) -> dict[str, Any]:
    """Check a cell and append its row to the journal; bundles of failures go to a folder. Returns the row."""
    cell, journal, bundles = work
    torch.set_num_threads(1)
    wall, start = time.perf_counter(), time.process_time()
    check = CellCheck(cell, bundles)
    op, _, config = cell.resolve()
    for seed, (row, sizes) in enumerate(examples(op, config, cell.number)):
        if len(check.wrong) < MAX_WRONG and (ran := check.run_first(row, sizes, seed)):
            check.enter_more(*ran, start + MAX_SECONDS)
    result = {
        **{"kind": "compiled_check", **vars(cell), "key": cell.key(), "examples": len(check.checked)},
        **{"wrong": check.wrong, "unsupported": sorted(check.unsupported), "kernels": check.blocks.rows()},
        **{"matrix_products": dict(check.classes), "compile_seconds": round(check.compiling, 1)},
        **{"cpu_seconds": round(time.process_time() - start, 1), "seconds": round(time.perf_counter() - wall, 1)},
        **rows.stamp(torch.device("cpu")),
    }
    rows.write(journal, [result])
    return result
