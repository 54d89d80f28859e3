"""Compiles the kernels of every implementation for GPUs this machine need not have, and reads what they cost.

    python -m bench.compiled --targets sm_80 gfx942 --dtypes float16 --only int4_matmul-packed-0    one JSON row each

A row's `wrong` says what may not be: no compilation, spilled registers (in float32, which is there to compare with,
`spills` only lists them), more shared memory than there is, less precision than was asked for, in an exact op other
roundings than the source's (`bench.compiler.precision`), weights loaded by fewer bytes than
configs/bench/inspect.toml says. It exits with 1 if there is any.

The launchers themselves run, on tensors without data and under a driver that only names its target, so a new file of
`kernels/` is compiled as it is called and listed nowhere. It happens in processes of their own.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import product
from multiprocessing import active_children, get_context
from typing import Any, Generic, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from vila_triton import kernels as door
from vila_triton.limits import COUNT
from vila_triton.registry import OPS, Impl, Unsupported, describe_available, discover
from vila_triton.registry.interpreter import uses_triton_kernels

from ._tool import tool
from .compiler.gpus import DEFAULT_TARGETS, TARGETS
from .compiler.kernel_stats import analyze_kernel
from .compiler.precision import find_imprecision
from .compiler.production_sizes import compile_spec
from .compiler.resources import kernel_resources

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CompileRequest:
    """A call of an implementation at given sizes, compiled for a target and not run; `config`: one, or its number."""

    op: str
    impl: str
    config: Mapping[str, Any] | int
    target: str
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class CompileResult(Generic[Result]):
    """What was read of each kernel the call launched with `config`; or why it launched none."""

    config: Mapping[str, Any] = field(default_factory=dict)
    kernels: list[Result] = field(default_factory=list)
    unsupported: str = ""
    error: str = ""


class CrossCompileDriver(DriverBase):
    """All of a driver that compiling asks for. Each target counts as a device, since Triton caches by device."""

    def __init__(self, target: str):
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target].triton_target

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


@contextmanager
def intercept_launches(target: str, launch: Callable[..., Any]) -> Iterator[None]:
    """Inside, a launch of a kernel is launch(kernel, *args, **kwargs); an autotuned one takes its first config."""

    def first_config(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

    run, tuned_run = JITFunction.run, Autotuner.run
    triton.runtime.driver.set_active(CrossCompileDriver(target))
    JITFunction.run, Autotuner.run = launch, first_config
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = run, tuned_run


def resolve_request(request: CompileRequest) -> tuple[Impl, Mapping[str, Any]]:
    """The implementation and the config of a call. Errors: ValueError if there is no such one."""
    impls = OPS[request.op].impls
    if request.impl not in impls:
        raise ValueError(f"{request.op} has no implementation {request.impl!r}; there are: {describe_available(impls)}")
    impl = impls[request.impl]
    if not isinstance(request.config, int):
        return impl, request.config
    if request.config not in range(len(impl.configs)):
        raise ValueError(f"{request.op} {request.impl} has no config {request.config}; there are {len(impl.configs)}")
    return impl, impl.configs[request.config]


@lru_cache
def meta_arguments(op: str, sizes: tuple[tuple[str, Any], ...]) -> Any:
    """Arguments of these sizes; no values, so that large ones take no room."""
    return OPS[op].make_example(**dict(sizes), rng=torch.Generator().manual_seed(0), device="meta")


def compile_request(analyze: Callable[[Any], Result], request: CompileRequest) -> CompileResult[Result]:
    """What `look` says of each kernel the call launches, as Triton's compiler leaves it (`.asm`, `.metadata`)."""
    launched: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    config: Mapping[str, Any] = {}
    try:
        impl, config = resolve_request(request)
        args = meta_arguments(request.op, tuple(request.sizes.items()))
        with intercept_launches(request.target, compile_only):
            impl(*args, config=config)
    except Unsupported as reason:
        return CompileResult(config, unsupported=str(reason))
    except Exception as error:
        return CompileResult(config, error=f"{type(error).__name__}: {error}")
    return CompileResult(config, [analyze(kernel) for kernel in launched])


def load_implementations(folder: str | None, peers: bool) -> dict[str, str]:
    """Find the implementations: those of `folder` in place of kernels/ if it is given, other libraries' if asked.

    Returns {library: why not} of those that cannot be used here.
    """
    if folder:
        door.__path__[:] = [folder]
    discover()
    if not peers:
        return {}
    from .peers import discover_peers as discover_peers

    return discover_peers()


def run_in_subprocesses(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int = 2,
    folder: str | None = None,
    peers: bool = False,
) -> Iterator[Result]:
    """work(item) of each, in order, from processes where the implementations are found and no kernel is interpreted.

    Ctrl-C is for this process to handle: it ends the others.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # a process inherits what is set as it starts
    other_children = set(active_children())
    pool = ProcessPoolExecutor(workers, get_context("spawn"), load_implementations, (folder, peers))
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited as well
        try:
            results = pool.map(work, items)  # starts them
        finally:
            signal.signal(signal.SIGINT, handler)
        yield from results
    except BaseException:
        for process in set(active_children()) - other_children:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def check_compiled(request: CompileRequest) -> list[dict[str, Any]]:
    """A row for each kernel of a call: what it takes, and `wrong`: what no kernel may do, in words."""

    def analyze(kernel: Any) -> dict[str, Any]:
        found = analyze_kernel(kernel).stats if documented_bytes else None
        width = found.loops[0].weight_bytes if found else None
        wrong = find_imprecision(kernel.asm, OPS[request.op].bitwise_exact)
        return {**asdict(kernel_resources(kernel)), "weight_bytes": width, "wrong": wrong}

    target = TARGETS[request.target]
    documented_bytes = None
    if target.triton_target.backend == "cuda":
        documented_bytes = compile_spec(OPS[request.op], request.impl, resolve_request(request)[1]).weight_load_bytes
    outcome = compile_request(analyze, request)
    if outcome.error:
        return [{"wrong": [outcome.error]}]
    for row in outcome.kernels:
        if row["spills"] and request.sizes["dtype"] != "float32":
            row["wrong"] += [f"spills {row['spills']} and uses {row['registers']} registers"]
        if row["shared"] > target.max_shared_per_block:
            row["wrong"] += [f"wants {row['shared']} bytes of shared memory, there are {target.max_shared_per_block}"]
    if documented_bytes and outcome.kernels:
        smallest_load = min((row["weight_bytes"] for row in outcome.kernels if row["weight_bytes"]), default=None)
        if smallest_load is None or smallest_load < documented_bytes:
            loaded = f"{smallest_load} bytes" if smallest_load else "an unknown number of bytes"
            outcome.kernels[0]["wrong"] += [
                f"a thread loads {loaded} of weights at a time, documented are {documented_bytes}"
            ]
    return outcome.kernels


@tool
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=DEFAULT_TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=["float16"])
    parser.add_argument("--only", nargs="*", default=[], help="op-impl-config")
    parser.add_argument("--kernels", metavar="FOLDER", help="take the implementations from here, not from kernels/")
    parser.add_argument("--workers", type=COUNT, default=2)
    args = parser.parse_args()
    load_implementations(args.kernels, peers=False)
    requests = {}
    for op in OPS.values():
        for impl in filter(uses_triton_kernels, op.impls.values()):
            for number, config in enumerate(impl.configs):
                name = f"{op.name}-{impl.name}-{number}"
                if not args.only or name in args.only:
                    default_sizes = compile_spec(op, impl.name, config).sizes
                    for dtype, target in product(args.dtypes, args.targets):
                        sizes = {**default_sizes, "dtype": dtype}
                        requests[name, dtype, target] = CompileRequest(op.name, impl.name, number, target, sizes)
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        outcomes = run_in_subprocesses(check_compiled, list(requests.values()), args.workers, args.kernels)
        for (call, dtype, target), kernels in zip(requests, outcomes):
            for row in kernels:
                print(json.dumps({"call": call, "target": target, "dtype": dtype, **row}))
                wrong |= bool(row["wrong"])
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
