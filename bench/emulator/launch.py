"""Launches of Triton kernels on tensors of the CPU, compiled for a GPU and run by the emulator."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..compiler.cross_compile import intercept_launches
from . import machine as trial_machine
from .code import Code, granule
from .machine import Machine, Region
from .parse import parse
from .report import Fault, KernelFault, Launch, Report

LANES = 8192  # threads in lockstep


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

    checks        watch for what no kernel may do; off is faster
    counters      count sectors, wavefronts and bytes; off is faster
    raise_faults  raise `KernelFault` at the end of a launch that had faults; else they are in the report only
    seed          of the order in which blocks run; 0: by number
    edit          applied to the PTX before it runs, to plant faults
    """
    report = Report(target)
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        started = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        options = {"debug": kwargs.get("debug", self.debug) or knobs.runtime.debug}
        options["instrumentation_mode"] = knobs.compilation.instrumentation_mode
        binder = self.device_caches[driver.active.get_current_device()][4]
        bound, _, _ = binder(*args, **kwargs, **options)
        if callable(grid):
            grid = grid(bound)
        blocks = tuple(int(g) for g in grid) + (1,) * (3 - len(grid))
        text = edit(compiled.asm["ptx"]) if edit else compiled.asm["ptx"]
        if text not in programs:
            programs[text] = Code(parse(text))
        program = programs[text]
        values: list[tuple[str, Any]] = []
        flatten(bound, compiled.src.signature, values)
        report.compile_seconds += time.perf_counter() - started
        regions, params = {}, {}
        for (label, value), (name, kind) in zip(values, program.kernel.params):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.nbytes():
                    start = storage.data_ptr()
                    regions.setdefault(start, Region(label, start, storage.nbytes(), element_map(start)))
                params[name] = np.array([[value.data_ptr()]], np.uint64)
            elif kind == "f32":
                params[name] = np.array([[value]], np.float32).view(np.uint32)
            else:
                bits = int(kind[1:])
                params[name] = np.array([[int(value) & (2**bits - 1)]], f"u{bits // 8}")
        for name, _ in program.kernel.params[len(values) :]:
            params[name] = np.zeros((1, 1), np.uint64)
        old = trial_machine.Report()
        started = time.perf_counter()
        total, threads, shared = int(np.prod(blocks)), program.kernel.threads, compiled.metadata.shared
        step = max(1, min(LANES // threads, 2**25 // max(shared, 1)))
        with np.errstate(all="ignore"):
            for first in range(0, total, step):
                ids = np.arange(first, min(total, first + step))
                Machine(
                    program.kernel, program, params, regions.values(), blocks, ids, shared, old,
                    granule(program.kernel), checks, counters,
                ).run()  # fmt: skip
        name = program.kernel.name
        faults = [
            Fault(kind, text, name, program.ins[i].text, program.ins[i].loc) for (kind, i), text in old.faults.items()
        ]
        seconds = time.perf_counter() - started
        report.launches.append(
            Launch(name, blocks, target, program, shared, seconds, faults, old.count, old.blocks)
        )
        if faults and raise_faults:
            raise KernelFault(faults)
        return compiled

    programs: dict[str, Code] = {}
    with permit_cpu(), intercept_launches(target, launch):
        yield report


def element_map(start: int) -> np.ndarray | None:
    """Which bytes of a buffer are elements of the tensor guarded in it; None if it is no guarded buffer."""
    return None


@contextmanager
def permit_cpu() -> Iterator[None]:
    """The launchers' own check lets tensors of the CPU pass."""
    from vila_triton.kernels import _launch

    def check_supported(op_name: str, *tensors: Any) -> None:
        for dtype in {x.dtype for x in tensors}:
            if dtype not in DTYPES:  # noqa: F821
                raise Unsupported(f"{op_name}: {dtype} is not one of {', '.join(map(str, DTYPES))}")  # noqa: F821

    code = _launch.check_supported.__code__
    _launch.check_supported.__code__ = check_supported.__code__
    try:
        yield
    finally:
        _launch.check_supported.__code__ = code


def flatten(values: Any, types: Any, out: list[tuple[str, Any]], label: str = "") -> None:
    """(name, value) of the arguments that are no constants, in order."""
    if isinstance(values, dict):
        items = zip(values.items(), types.values())
    else:
        items = (((f"{label}[{i}]", v), t) for i, (v, t) in enumerate(zip(values, types)))
    for (name, value), kind in items:
        if isinstance(kind, tuple):
            flatten(value, kind, out, name)
        elif kind != "constexpr":
            out.append((name, value))
