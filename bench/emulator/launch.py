"""Launches of Triton kernels on tensors of the CPU, compiled for a GPU and run by the emulator."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from operator import index
from typing import Any
from unittest.mock import patch

import numpy as np
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .arguments import flatten_arguments, memory_regions, parameter_bits
from .compile import check_resources, compiling_to_ptx
from .machine import Findings, Machine, Way, run_by_turns
from .memory.global_memory import Regions
from .memory.regions import Region
from .program.ptx import parse
from .program.translate import Program, translate
from .report import Fault, KernelFault, Launch, Report, own_line

LANES = 8192  # threads in lockstep
PATIENCE = 256  # times that these may wait for others, before others begin
MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # blocks along each axis (CUDA C++ programming guide)


@contextmanager
def emulating(
    target: str,
    *,
    checks: bool = True,
    counters: bool = True,
    raise_faults: bool = True,
    seed: int = 0,
    edit: Callable[[str], str] | None = None,
) -> Iterator[Report]:
    """Inside, kernels that are launched on tensors of the CPU are compiled for the target and emulated.

    target        as "sm_80"
    checks        watch for what no kernel may do; off is faster
    counters      count sectors, wavefronts and bytes; off is faster
    raise_faults  raise `KernelFault` at the end of a launch that had faults; else they are in the report only
    seed          of the order in which blocks run; 0: by number
    edit          applied to the PTX before it runs, to plant faults

    An autotuned kernel takes the first of its configs that the GPU has room for. Errors: ValueError, and
    NotImplementedError for what is not emulated; RuntimeError for a kernel that is interpreted.
    """
    report = Report(target)

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        started = time.perf_counter()
        compiled = compile_kernel(kernel, *args, **kwargs)
        report.compile_seconds += time.perf_counter() - started
        if not warmup:
            emulate(compiled, grid, bind_arguments(kernel, args, kwargs))
        return compiled

    def launch_compiled(compiled: Any, grid: Any) -> Any:
        """Launches a kernel that `kernel.warmup(...)` compiled, with all arguments by position."""

        def launch_with(*args: Any) -> None:
            names = list(compiled.src.signature)
            if len(args) != len(names):
                raise TypeError(f"{compiled.name} takes {len(names)} arguments ({', '.join(names)}), not {len(args)}")
            emulate(compiled, grid, dict(zip(names, args)))

        return launch_with

    def emulate(compiled: Any, grid: Any, values: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        check_resources(compiled, target)
        arguments = flatten_arguments(compiled.name, values, compiled.src.signature)
        program = translate_ptx(edit(compiled.asm["ptx"]) if edit else compiled.asm["ptx"])
        report.compile_seconds += time.perf_counter() - started
        blocks = grid_size(compiled.name, grid(values) if callable(grid) else grid)
        ran = run_blocks(program, compiled, target, blocks, arguments, checks, counters, seed)
        report.launches.append(ran)
        if ran.faults and raise_faults:
            raise KernelFault(ran.faults)

    with (
        compiling_to_ptx(target) as compile_kernel,
        patch.object(JITFunction, "run", launch),
        patch.object(CompiledKernel, "__getitem__", launch_compiled),
        patch.object(Autotuner, "run", run_first_config),
        patch.object(InterpretedFunction, "run", refuse_interpreted),
    ):
        yield report


@lru_cache(maxsize=64)
def translate_ptx(ptx: str) -> Program:
    """The program that runs a PTX text."""
    return translate(parse(ptx))


def bind_arguments(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of all arguments of a kernel, defaults included, as Triton binds them."""
    options = {"debug": False, "instrumentation_mode": knobs.compilation.instrumentation_mode}
    active: Any = driver.active
    bind = kernel.device_caches[active.get_current_device()][4]
    return bind(*args, **options | kwargs)[0]


def grid_size(kernel: str, grid: Any) -> tuple[int, int, int]:
    """A grid of one to three axes as three.

    Errors: ValueError if there are more axes, or an axis has fewer than none or more blocks than a GPU's may have;
    TypeError if their number is not whole.
    """
    x, y, z, *rest = blocks = tuple(index(n) for n in grid) + (1,) * (3 - len(grid))
    if rest or min(blocks) < 0:
        raise ValueError(f"{kernel}: a grid of {blocks} blocks, which should be up to three numbers from 0")
    if any(n > most for n, most in zip(blocks, MAX_GRID)):
        raise ValueError(f"{kernel}: a grid of {blocks} blocks, of which a GPU takes at most {MAX_GRID}")
    return x, y, z


def run_blocks(
    program: Program,
    compiled: Any,
    target: str,
    grid: tuple[int, int, int],
    arguments: list[tuple[str, str, Any]],
    checks: bool,
    counters: bool,
    seed: int,
) -> Launch:
    """Run all blocks of a launch, as many at once as `LANES` threads allow."""
    kernel, shared, total = program.kernel, compiled.metadata.shared, int(np.prod(grid))
    regions = memory_regions(kernel.name, arguments)
    bits = [parameter_bits(kernel.name, *argument) for argument in arguments]
    # behind its arguments Triton's kernels have memory that the launch allocates, and the profiler's
    scratch = np.zeros(total * compiled.metadata.global_scratch_size + 128, np.uint8)
    aligned = scratch.ctypes.data + -scratch.ctypes.data % 128
    if compiled.metadata.global_scratch_size:
        regions.append(Region("global scratch", aligned, scratch.nbytes - 128))
    bits += [np.array([aligned], np.uint64), np.array([0], np.uint64)]
    regions += [Region(name, data.ctypes.data, data.nbytes) for name, data in program.variables.items()]
    parameters = {name: value[None] for (name, _), value in zip(kernel.params, bits)}
    findings, memory = Findings(), Regions(regions)
    order = np.random.default_rng(seed).permutation(total) if seed else np.arange(total)
    step = max(1, min(LANES // kernel.threads, 2**25 // max(shared, 1)))
    started = time.perf_counter()
    ways: list[Way] = []
    with np.errstate(all="ignore"):
        for first in range(0, total, step):
            blocks = order[first : first + step]
            machine = Machine(program, parameters, memory, grid, blocks, shared, findings, checks, counters)
            patience = PATIENCE * max(1, len(ways)) ** 2 if first + step < total else math.inf  # few are left
            ways = run_by_turns([*ways, (machine, 0)], patience)
    seconds = time.perf_counter() - started
    instructions = program.instructions
    faults = [
        Fault(
            kind, message, kernel.name, instructions[i].text, own_line(instructions[i].source, *instructions[i].callers)
        )
        for (kind, i), message in findings.faults.items()
    ]
    return Launch(kernel.name, grid, target, program, shared, seconds, faults, findings.counts, findings.entered)


def run_first_config(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Launch an autotuned kernel with the first of its configs that the GPU has room for."""
    tuner.nargs = dict(zip(tuner.arg_names, args))
    try:
        configs = tuner.prune_configs(kwargs)
        for config in configs:
            if config.pre_hook:
                config.pre_hook({**tuner.nargs, **kwargs, **config.all_kwargs()})
            try:
                return tuner.fn.run(*args, **kwargs, **config.all_kwargs())
            except OutOfResources:
                if config is configs[-1]:
                    raise
    finally:
        tuner.nargs = None


def refuse_interpreted(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Raise RuntimeError with the reason that a kernel is not compiled."""
    raise RuntimeError(
        f"{kernel.fn.__name__} is interpreted, not compiled: TRITON_INTERPRET was set when its file was imported. "
        "Unset it and start again."
    )
