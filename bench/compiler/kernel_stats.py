"""A compiled kernel as figures: what it takes of a GPU, and what the instructions of its main loop are for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton import knobs

from . import loops as turns
from .disassembly import (
    KINDS,
    SHARED,
    TENSOR,
    Instruction,
    Loop,
    main_loops,
    parse_amdgcn,
    parse_sass,
    reachable_instructions,
)
from .gpus import TARGETS, occupancy
from .resources import kernel_resources, run_on_cubin


@dataclass(frozen=True)
class LoopStats:
    """One loop, counted in instructions a thread issues from its head back to it (`whole`: the kernel has no loop).

    `mix` by kind; `tensor`, `loads`, `stores`, `shared` by opcode; `weight_loads` those of `loads` at the source line
    that loads 4-bit codes, and `weight_bytes` the least a thread loads by one of them, None if the line loads other
    operands too. `turns`: how many turns of the source's loop it does; `weights` and `scores`: 4-bit codes loaded and
    exponentials taken by the block in all of them, if it is the loop of an int4 product or of attention; None: unknown.
    """

    where: str
    whole: bool
    instructions: int
    mix: dict[str, int]
    tensor: dict[str, int]
    loads: dict[str, int]
    stores: dict[str, int]
    shared: dict[str, int]
    weight_loads: dict[str, int]
    weight_bytes: int | None
    turns: int | None
    weights: int | None
    scores: int | None


@dataclass(frozen=True)
class KernelStats:
    """One kernel. `tile`: its blocks, warps and stages, as they were compiled; `registers` and `spills` of a thread,
    `shared` bytes of a block, `blocks` and `warps` a multiprocessor holds at once, `occupancy` their share of the most,
    `limit` what stops more. The main loop is first.
    """

    kernel: str
    tile: dict[str, int]
    threads: int
    registers: int
    spills: int
    shared: int
    blocks: int
    warps: int
    occupancy: float
    limit: str
    instructions: int
    loops: list[LoopStats]


@dataclass(frozen=True)
class KernelAnalysis:
    """The figures, and the code they are counted in: `main` are the numbers of the main loop's instructions."""

    stats: KernelStats
    instructions: list[Instruction]
    main_loop: list[int]


def analyze_kernel(kernel: Any) -> KernelAnalysis:
    """Take a kernel apart, as Triton's compiler leaves it (`.asm`, `.metadata`)."""
    metadata, usage = kernel.metadata, kernel_resources(kernel)
    target = next(
        t
        for t in TARGETS.values()
        if (t.triton_target.backend, t.triton_target.arch) == (metadata.target.backend, metadata.target.arch)
    )
    residency = occupancy(target, usage.registers, usage.shared, metadata.num_warps)
    code = read_instructions(kernel.asm)
    loops = main_loops(code)
    stats = KernelStats(
        kernel=usage.name,
        tile=tile_config(kernel),
        threads=metadata.num_warps * metadata.warp_size,
        registers=usage.registers,
        spills=usage.spills,
        shared=usage.shared,
        blocks=residency.blocks,
        warps=residency.warps,
        occupancy=residency.share,
        limit=residency.limit,
        instructions=len(reachable_instructions(code)),
        loops=[loop_stats(code, loop, kernel.asm["ttgir"]) for loop in loops],
    )
    return KernelAnalysis(stats, code, list(loops[0].indices))


def tile_config(kernel: Any) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, ..., SPLIT_K, num_warps and num_stages, by whatever names the kernel has for the first."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    blocks = {k.replace("_SIZE", ""): v for k, v in constants.items() if k.startswith("BLOCK") or k == "SPLIT_K"}
    return {**blocks, "num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}


def read_instructions(asm: dict[str, Any]) -> list[Instruction]:
    """The instructions of a compiled kernel, with the source line of each."""
    if "amdgcn" in asm:
        return parse_amdgcn(asm["amdgcn"])
    return parse_sass(run_on_cubin(knobs.nvidia.nvdisasm.path, "-g", "-c", cubin=asm["cubin"]))


def loop_stats(code: Sequence[Instruction], loop: Loop, ttgir: str) -> LoopStats:
    body = [code[i] for i in loop.indices]
    kinds = Counter(x.kind for x in body)
    unrolling = turns.unroll_factor(ttgir, body, loop.is_whole_kernel)
    factor, iteration = unrolling or (None, None)
    code_loads, only_codes = iteration.weight_loads(body) if iteration else ([], False)
    return LoopStats(
        where=source_range(code, body),
        whole=loop.is_whole_kernel,
        instructions=len(body),
        mix={kind: kinds[kind] for kind in KINDS if kinds[kind]},
        tensor=count_opcodes(x for x in body if x.kind == TENSOR),
        loads=count_opcodes(x for x in body if x.is_load),
        stores=count_opcodes(x for x in body if x.is_store),
        shared=count_opcodes(x for x in body if x.kind == SHARED),
        weight_loads=count_opcodes(code_loads),
        weight_bytes=min((x.bytes_per_thread for x in code_loads), default=None) if only_codes else None,
        turns=factor,
        weights=factor * iteration.weights if factor and iteration else None,
        scores=factor * iteration.exponentials if factor and iteration else None,
    )


def count_opcodes(instructions: Any) -> dict[str, int]:
    return dict(sorted(Counter(x.short for x in instructions).items(), key=lambda item: (-item[1], item[0])))


def source_range(code: Sequence[Instruction], body: Sequence[Instruction]) -> str:
    """The first and last line of the loop in the file of the kernel, or in another if none of it comes from there."""
    files = [x.file for x in (code[0], *body) if x.file]
    file = next((name for name in files if any(x.file == name for x in body)), "")
    lines = [x.line for x in body if x.file == file and x.line]
    return f"{Path(file).name}:{min(lines)}-{max(lines)}" if lines else ""


def to_row(stats: KernelStats, unit: str | None, query_rows: int | None = None) -> dict[str, Any]:
    """All of it as one row of JSON. Of weights and scores only the unit is kept: `units` of a loop, and `per_unit`,
    the instructions that all threads of a block issue in the loop for each of them; the row's is the main loop's.

    rows: how many rows of queries share their keys; a tile is padded to so many, which are no scores.
    """
    row: dict[str, Any] = {**asdict(stats), "unit": unit}
    for loop in row["loops"]:
        scores = loop.pop("scores")
        keys_per_loop = stats.tile.get("BLOCK_N", 0) * (loop["turns"] or 0)
        if scores and query_rows and keys_per_loop and scores % keys_per_loop == 0:
            tile_rows = scores // keys_per_loop
            scores *= query_rows / (-(-query_rows // tile_rows) * tile_rows)
        counts = {"weight": loop.pop("weights"), "score": scores}
        loop["units"] = counts.get(unit or "") or None
        loop["per_unit"] = loop["instructions"] * stats.threads / loop["units"] if loop["units"] else None
    return row | {"per_unit": row["loops"][0]["per_unit"]}
