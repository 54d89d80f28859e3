"""The work of the launches of a decoded token, for `token_time`: bytes of its op, instructions of its machine code."""

from functools import lru_cache
from typing import Any

from vila_triton.registry import OPS

from ..compiler.cross_compile import CompileRequest
from ..compiler.kernel_stats import KernelStats, analyze_kernel, to_row
from ..emulator.counters.emulated_call import emulate_call
from ..emulator.counters.emulated_sizes import emulated_sizes
from ..tuner.cost_model import known_gpus, wasted_seconds
from .decode_step import Call
from .token_time import Work

WARP = 32  # threads


def units_of(call: Call) -> tuple[str | None, float]:
    """Returns what the main loop of a launch goes through, as `bench.inspect` counts it, and how many of them: weights,
    scores, or None.
    """
    sizes = dict(call.sizes)
    if not call.first:
        return None, 0
    flops = OPS[call.op].cost(**sizes)[0]
    if call.op.startswith("int4_"):
        return "weight", flops / (2 * sizes["m"])
    return ("score", flops / (4 * sizes["d"])) if call.op == "decode_attention" else (None, 0)


def issued_instructions(call: Call, stats: KernelStats, programs: int, turns: float) -> float:
    """Returns the instructions of warps of a launch: those of the main loop for each weight or score, or, where it goes
    through neither, in so many turns of it; and all others once.
    """
    unit, units = units_of(call)
    sizes = dict(call.sizes)
    row = to_row(stats, unit, sizes.get("ratio"))
    blocks_of_rows = -(-sizes.get("m", 1) // stats.tile.get("BLOCK_M", 1)) if unit == "weight" else 1
    outside = stats.instructions - (0 if stats.loops[0].whole else stats.loops[0].instructions)
    threads = programs * stats.threads
    if row["per_unit"] and units:
        in_loop = row["per_unit"] * units * blocks_of_rows
    else:
        in_loop = 0 if stats.loops[0].whole else threads * stats.loops[0].instructions * turns
    return (threads * outside + in_loop) / WARP


@lru_cache
def wasted_by(op: str, impl: str, config: Any, sizes: Any, gpu: str) -> float:
    """Returns the seconds that a call loses to sectors beyond the fewest and to bank conflicts, as the emulator counts
    them at small sizes (see `wasted_seconds`). config and sizes: items. Errors: RuntimeError if it cannot be emulated.
    """
    small = emulated_sizes(OPS[op], impl, dict(config))[0]
    result = emulate_call(CompileRequest(op, impl, dict(config), known_gpus()[gpu].arch, small), checks=False)
    if not result.kernels:
        raise RuntimeError(f"{op} {impl} was not emulated: {result.error or result.unsupported}")
    names = ("sectors", "fewest_sectors", "wavefronts", "accesses")
    counts = {name: sum(row[name] for row in result.kernels) for name in names}
    return wasted_seconds(OPS[op].impls[impl], dict(config), dict(sizes), small, counts, known_gpus()[gpu])


def work_of(call: Call) -> Work:
    """Returns the work of a launch. An op's bytes are those of its first launch; an operator of torch outside of any op
    has latencies only, as has a launch whose kernel declares no cost.
    """
    sizes, config = dict(call.sizes), dict(call.config)
    least = OPS[call.op].cost(**sizes)[1] if call.first else 0
    if call.launch is None:
        return Work(1, least)
    programs = call.launch.grid[0] * call.launch.grid[1] * call.launch.grid[2]
    stats = analyze_kernel(call.launch.compiled).stats
    warps, resident = stats.threads // WARP, max(1, stats.blocks)
    space = OPS[call.op].impls[call.impl].space
    cost: Any = space.launch_cost(config, **sizes) if call.first and space and space.launch_cost else None
    if cost is None:
        issued = issued_instructions(call, stats, programs, 1)
        return Work(programs, least, 0, None, issued, warps, resident)
    stage = max(1, cost.bytes_per_stage)
    return Work(
        programs,
        least,
        programs * cost.bytes,
        stage * config.get("num_stages", 1),
        issued_instructions(call, stats, programs, max(1, cost.bytes / stage)),
        warps,
        resident,
    )
