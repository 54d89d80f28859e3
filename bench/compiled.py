"""Compiles the kernels of every implementation for GPUs this machine need not have, and reads what they cost.

    python -m bench.compiled --targets sm_80 gfx942 --dtypes float16 --only int4_matmul-triton-0    one JSON row each

The launchers themselves run, on tensors without data and under a driver that only names its target, so a new file of
`kernels/` is compiled as it is called and listed nowhere. Run it without TRITON_INTERPRET.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from vila_triton.registry import OPS, Impl, OneOf, Sizes, Unsupported, discover

KiB = 1024
# Shared memory one block may use: CUDA programming guide, table of compute capabilities; CDNA3 ISA, local data share.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KiB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KiB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KiB),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel that one call launched; `registers` a thread, `spills` in bytes (NVIDIA) or registers (AMD).

    If the call failed, `error` says how, and there is no name.
    """

    op: str
    impl: str
    config: int
    target: str
    dtype: str
    name: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""


class _NamesItsTarget(DriverBase):
    """All of a driver that compiling asks for. Each target counts as a device, since Triton caches by device."""

    def __init__(self, target: str):
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target][0]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def representative(domain: Sizes | OneOf) -> Any:
    """The largest size, a multiple of 16 if there is one, as the axes of real models are."""
    if isinstance(domain, OneOf):
        return max(domain.values)
    sizes = range(domain.low, domain.high + 1, domain.step)
    return max((n for n in sizes if n % 16 == 0 and n), default=sizes[-1])


def kernels(op: str, impl: str, config: int, target: str, dtype: str) -> list[Kernel]:
    """What one call of an implementation compiles, for representative sizes."""
    discover()
    domain = OPS[op].domain
    sizes = {n: dtype if n == "dtype" else representative(d) for n, d in domain.items()}
    args = OPS[op].example(**sizes, rng=torch.Generator().manual_seed(0), device="meta")
    launched: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    triton.runtime.driver.set_active(_NamesItsTarget(target))
    JITFunction.run = compile_only
    try:
        chosen = OPS[op].impls[impl]
        chosen(*args, config=chosen.configs[config])
    except Unsupported:
        return []
    except Exception as error:
        return [Kernel(op, impl, config, target, dtype, error=f"{type(error).__name__}: {error}")]
    finally:
        JITFunction.run = run
    read = resources_amd if target.startswith("gfx") else resources_nvidia
    return [Kernel(op, impl, config, target, dtype, k.name, *read(k), k.metadata.shared) for k in launched]


def resources_nvidia(kernel: Any) -> tuple[int, int]:
    """(registers a thread, bytes a thread spills): what `cuobjdump` of the Triton wheel says of the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"\b{word}:(\d+)", text)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def resources_amd(kernel: Any) -> tuple[int, int]:
    """(vector registers a thread, registers spilled): the metadata at the end of the assembly."""
    found = {word: int(n) for word, n in re.findall(r"\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"])}
    return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]


def holds_kernels(impl: Impl) -> bool:
    """Whether the file of the implementation defines or imports a Triton kernel."""
    kinds = (JITFunction, InterpretedFunction)
    return any(isinstance(value, kinds) for value in vars(sys.modules[impl.fn.__module__]).values())


def every(targets: Iterable[str], dtypes: Iterable[str], only: Iterable[str] = (), workers: int = 2) -> list[Kernel]:
    """The kernels of every (op, impl, config), or of those named in `only` as op-impl-config."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted and nothing is compiled")
    discover()
    wanted = set(only)
    calls = [
        (op.name, impl.name, config, target, dtype)
        for op in OPS.values()
        for impl in op.impls.values()
        if holds_kernels(impl)
        for config in range(len(impl.configs))
        if not wanted or f"{op.name}-{impl.name}-{config}" in wanted
        for dtype in dtypes
        for target in targets
    ]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        found = pool.map(kernels, *zip(*calls), chunksize=4) if calls else []
        return [kernel for row in found for kernel in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["float16"])
    parser.add_argument("--only", nargs="*", default=[], help="op-impl-config")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        for kernel in every(options.targets, options.dtypes, options.only, options.workers):
            print(json.dumps(asdict(kernel)))


if __name__ == "__main__":
    main()
