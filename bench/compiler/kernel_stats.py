"""A compiled kernel as figures: what it takes of a GPU, and what the instructions of its main loop are for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton import knobs

from . import loops as turns
from .disassembly import KINDS, SHARED, TENSOR, Instruction, Loop, amd, nvidia, reachable, working
from .gpus import TARGETS, occupancy
from .resources import resources, run_on_cubin


@dataclass(frozen=True)
class LoopFigures:
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
class Anatomy:
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
    loops: list[LoopFigures]


@dataclass(frozen=True)
class Dissection:
    """The figures, and the code they are counted in: `main` are the numbers of the main loop's instructions."""

    anatomy: Anatomy
    code: list[Instruction]
    main: list[int]


def dissect(kernel: Any) -> Dissection:
    """Take a kernel apart, as Triton's compiler leaves it (`.asm`, `.metadata`)."""
    meta, takes = kernel.metadata, resources(kernel)
    target = next(t for t in TARGETS.values() if (t.gpu.backend, t.gpu.arch) == (meta.target.backend, meta.target.arch))
    held = occupancy(target, takes.registers, takes.shared, meta.num_warps)
    code = read(kernel.asm)
    found = working(code)
    anatomy = Anatomy(
        kernel=takes.name,
        tile=tile_of(kernel),
        threads=meta.num_warps * meta.warp_size,
        registers=takes.registers,
        spills=takes.spills,
        shared=takes.shared,
        blocks=held.blocks,
        warps=held.warps,
        occupancy=held.share,
        limit=held.limit,
        instructions=len(reachable(code)),
        loops=[loop_figures(code, loop, kernel.asm["ttgir"]) for loop in found],
    )
    return Dissection(anatomy, code, list(found[0].body))


def tile_of(kernel: Any) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, ..., SPLIT_K, num_warps and num_stages, by whatever names the kernel has for the first."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    blocks = {k.replace("_SIZE", ""): v for k, v in constants.items() if k.startswith("BLOCK") or k == "SPLIT_K"}
    return {**blocks, "num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}


def read(asm: dict[str, Any]) -> list[Instruction]:
    """The instructions of a compiled kernel, with the source line of each."""
    if "amdgcn" in asm:
        return amd(asm["amdgcn"])
    return nvidia(run_on_cubin(knobs.nvidia.nvdisasm.path, "-g", "-c", cubin=asm["cubin"]))


def loop_figures(code: Sequence[Instruction], loop: Loop, ttgir: str) -> LoopFigures:
    body = [code[i] for i in loop.body]
    kinds = Counter(x.kind for x in body)
    counted = turns.count(ttgir, body, loop.whole)
    number, turn = counted or (None, None)
    codes, alone = turn.of_weights(body) if turn else ([], False)
    return LoopFigures(
        where=place(code, body),
        whole=loop.whole,
        instructions=len(body),
        mix={kind: kinds[kind] for kind in KINDS if kinds[kind]},
        tensor=opcodes(x for x in body if x.kind == TENSOR),
        loads=opcodes(x for x in body if x.loads),
        stores=opcodes(x for x in body if x.stores),
        shared=opcodes(x for x in body if x.kind == SHARED),
        weight_loads=opcodes(codes),
        weight_bytes=min((x.width for x in codes), default=None) if alone else None,
        turns=number,
        weights=number * turn.weights if number and turn else None,
        scores=number * turn.exponentials if number and turn else None,
    )


def opcodes(instructions: Any) -> dict[str, int]:
    return dict(sorted(Counter(x.short for x in instructions).items(), key=lambda item: (-item[1], item[0])))


def place(code: Sequence[Instruction], body: Sequence[Instruction]) -> str:
    """The first and last line of the loop in the file of the kernel, or in another if none of it comes from there."""
    files = [x.file for x in (code[0], *body) if x.file]
    file = next((name for name in files if any(x.file == name for x in body)), "")
    lines = [x.line for x in body if x.file == file and x.line]
    return f"{Path(file).name}:{min(lines)}-{max(lines)}" if lines else ""


def figures(anatomy: Anatomy, unit: str | None, rows: int | None = None) -> dict[str, Any]:
    """All of it as one row of JSON. Of weights and scores only the unit is kept: `units` of a loop, and `per_unit`,
    the instructions that all threads of a block issue in the loop for each of them; the row's is the main loop's.

    rows: how many rows of queries share their keys; a tile is padded to so many, which are no scores.
    """
    row: dict[str, Any] = {**asdict(anatomy), "unit": unit}
    for loop in row["loops"]:
        scores = loop.pop("scores")
        of_a_turn = anatomy.tile.get("BLOCK_N", 0) * (loop["turns"] or 0)
        if scores and rows and of_a_turn and scores % of_a_turn == 0:
            tile = scores // of_a_turn
            scores *= rows / (-(-rows // tile) * tile)
        counts = {"weight": loop.pop("weights"), "score": scores}
        loop["units"] = counts.get(unit or "") or None
        loop["per_unit"] = loop["instructions"] * anatomy.threads / loop["units"] if loop["units"] else None
    return row | {"per_unit": row["loops"][0]["per_unit"]}
