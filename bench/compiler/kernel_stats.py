"""The figures of one compiled kernel: its resources, and the purpose of the instructions in its main loop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton import knobs

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
from .loops import unroll_factor
from .resources import kernel_resources, run_on_cubin


@dataclass(frozen=True)
class LoopStats:
    """One loop, in instructions that a thread issues per pass; `whole` says that the kernel has no loop.

    `mix` counts by kind; `tensor`, `loads`, `stores` and `shared` by opcode. `weight_loads` are those of `loads` at the
    source line that loads 4-bit codes, `weight_bytes` the fewest bytes that a thread loads by one of them (None if the
    line loads other operands too). `turns` is the unroll factor; `weights` and `scores` are the 4-bit codes that the
    block loads and the exponentials that it takes in a pass, None if unknown or if the loop has none.
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
    """One kernel. `tile`: block sizes, warps and stages as compiled; `registers` and `spills` (bytes) per thread,
    `shared` bytes per block; `blocks` and `warps` that a multiprocessor runs at once, `occupancy` their share of the
    maximum and `limit` the resource that allows no more. The main loop is the first of `loops`.
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
    """The figures of a kernel and its code; `main_loop` holds the indices of the main loop's instructions."""

    stats: KernelStats
    instructions: list[Instruction]
    main_loop: list[int]


def analyze_kernel(kernel: Any) -> KernelAnalysis:
    """Returns the figures of a kernel as Triton's compiler leaves it (`.asm`, `.metadata`)."""
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
    """Returns BLOCK_M, BLOCK_N, ..., SPLIT_K, num_warps and num_stages."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    blocks = {k.replace("_SIZE", ""): v for k, v in constants.items() if k.startswith("BLOCK") or k == "SPLIT_K"}
    return {**blocks, "num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}


def read_instructions(asm: dict[str, Any]) -> list[Instruction]:
    """Returns the instructions of a compiled kernel, each with its source line."""
    if "amdgcn" in asm:
        return parse_amdgcn(asm["amdgcn"])
    return parse_sass(run_on_cubin(knobs.nvidia.nvdisasm.path, "-g", "-c", cubin=asm["cubin"]))


def loop_stats(code: Sequence[Instruction], loop: Loop, ttgir: str) -> LoopStats:
    """Returns the figures of one loop."""
    body = [code[i] for i in loop.indices]
    kinds = Counter(x.kind for x in body)
    unrolling = unroll_factor(ttgir, body, loop.is_whole_kernel)
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
    """Returns opcodes with their counts, the most frequent first."""
    return dict(sorted(Counter(x.base_opcode for x in instructions).items(), key=lambda item: (-item[1], item[0])))


def source_range(code: Sequence[Instruction], body: Sequence[Instruction]) -> str:
    """Returns the first and last line of a loop in the kernel's file, or in another file if none of it comes from
    there.
    """
    files = [x.file for x in (code[0], *body) if x.file]
    file = next((name for name in files if any(x.file == name for x in body)), "")
    lines = [x.line for x in body if x.file == file and x.line]
    return f"{Path(file).name}:{min(lines)}-{max(lines)}" if lines else ""


def to_row(stats: KernelStats, unit: str | None, query_rows: int | None = None) -> dict[str, Any]:
    """Returns all figures as one row of JSON.

    `units` of a loop are its weights or scores, and `per_unit` the instructions that all threads of a block issue for
    each of them; the row's `per_unit` is the main loop's. query_rows: the rows of queries that share their keys; a tile
    is padded beyond them, and the padding is no scores.
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
