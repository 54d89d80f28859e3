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
from vila_triton.registry import OPS, Impl, Unsupported, discover, there
from vila_triton.registry.interpreter import holds_kernels

from ._tool import tool
from .compiler.gpus import CHECKED, TARGETS
from .compiler.kernel_stats import dissect
from .compiler.precision import imprecise
from .compiler.production_sizes import production
from .compiler.resources import resources

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """A call of an implementation at given sizes, compiled for a target and not run; `config`: one, or its number."""

    op: str
    impl: str
    config: Mapping[str, Any] | int
    target: str
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What was read of each kernel the call launched with `config`; or why it launched none."""

    config: Mapping[str, Any] = field(default_factory=dict)
    kernels: list[T] = field(default_factory=list)
    unsupported: str = ""
    error: str = ""


class NamesItsTarget(DriverBase):
    """All of a driver that compiling asks for. Each target counts as a device, since Triton caches by device."""

    def __init__(self, target: str):
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target].gpu

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
def launching(target: str, launch: Callable[..., Any]) -> Iterator[None]:
    """Inside, a launch of a kernel is launch(kernel, *args, **kwargs); an autotuned one takes its first config."""

    def first_config(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

    run, tuned_run = JITFunction.run, Autotuner.run
    triton.runtime.driver.set_active(NamesItsTarget(target))
    JITFunction.run, Autotuner.run = launch, first_config
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = run, tuned_run


def chosen(call: Call) -> tuple[Impl, Mapping[str, Any]]:
    """The implementation and the config of a call. Errors: ValueError if there is no such one."""
    impls = OPS[call.op].impls
    if call.impl not in impls:
        raise ValueError(f"{call.op} has no implementation {call.impl!r}; there are: {there(impls)}")
    impl = impls[call.impl]
    if not isinstance(call.config, int):
        return impl, call.config
    if call.config not in range(len(impl.configs)):
        raise ValueError(f"{call.op} {call.impl} has no config {call.config}; there are {len(impl.configs)}")
    return impl, impl.configs[call.config]


@lru_cache
def without_data(op: str, sizes: tuple[tuple[str, Any], ...]) -> Any:
    """Arguments of these sizes; no values, so that large ones take no room."""
    return OPS[op].example(**dict(sizes), rng=torch.Generator().manual_seed(0), device="meta")


def compile_call(look: Callable[[Any], T], call: Call) -> Outcome[T]:
    """What `look` says of each kernel the call launches, as Triton's compiler leaves it (`.asm`, `.metadata`)."""
    launched: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    config: Mapping[str, Any] = {}
    try:
        impl, config = chosen(call)
        args = without_data(call.op, tuple(call.sizes.items()))
        with launching(call.target, compile_only):
            impl(*args, config=config)
    except Unsupported as reason:
        return Outcome(config, unsupported=str(reason))
    except Exception as error:
        return Outcome(config, error=f"{type(error).__name__}: {error}")
    return Outcome(config, [look(kernel) for kernel in launched])


def prepare(folder: str | None, peers: bool) -> dict[str, str]:
    """Find the implementations: those of `folder` in place of kernels/ if it is given, other libraries' if asked.

    Returns {library: why not} of those that cannot be used here.
    """
    if folder:
        door.__path__[:] = [folder]
    discover()
    if not peers:
        return {}
    from .peers import discover as discover_peers

    return discover_peers()


def elsewhere(
    work: Callable[[S], T], items: Sequence[S], workers: int = 2, folder: str | None = None, peers: bool = False
) -> Iterator[T]:
    """work(item) of each, in order, from processes where the implementations are found and no kernel is interpreted.

    Ctrl-C is for this process to handle: it ends the others.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # a process inherits what is set as it starts
    before = set(active_children())
    pool = ProcessPoolExecutor(workers, get_context("spawn"), prepare, (folder, peers))
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited as well
        try:
            answers = pool.map(work, items)  # starts them
        finally:
            signal.signal(signal.SIGINT, handler)
        yield from answers
    except BaseException:
        for process in set(active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def proof(call: Call) -> list[dict[str, Any]]:
    """A row for each kernel of a call: what it takes, and `wrong`: what no kernel may do, in words."""

    def look(kernel: Any) -> dict[str, Any]:
        found = dissect(kernel).anatomy if documented else None
        width = found.loops[0].weight_bytes if found else None
        wrong = imprecise(kernel.asm, OPS[call.op].exact)
        return {**asdict(resources(kernel)), "weight_bytes": width, "wrong": wrong}

    target = TARGETS[call.target]
    documented = None
    if target.gpu.backend == "cuda":
        documented = production(OPS[call.op], call.impl, chosen(call)[1]).weights
    outcome = compile_call(look, call)
    if outcome.error:
        return [{"wrong": [outcome.error]}]
    for row in outcome.kernels:
        if row["spills"] and call.sizes["dtype"] != "float32":
            row["wrong"] += [f"spills {row['spills']} and uses {row['registers']} registers"]
        if row["shared"] > target.block_shared:
            row["wrong"] += [f"wants {row['shared']} bytes of shared memory, there are {target.block_shared}"]
    if documented and outcome.kernels:
        least = min((row["weight_bytes"] for row in outcome.kernels if row["weight_bytes"]), default=None)
        if least is None or least < documented:
            said = f"{least} bytes" if least else "an unknown number of bytes"
            outcome.kernels[0]["wrong"] += [f"a thread loads {said} of weights at a time, documented are {documented}"]
    return outcome.kernels


@tool
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=CHECKED)
    parser.add_argument("--dtypes", nargs="+", default=["float16"])
    parser.add_argument("--only", nargs="*", default=[], help="op-impl-config")
    parser.add_argument("--kernels", metavar="FOLDER", help="take the implementations from here, not from kernels/")
    parser.add_argument("--workers", type=COUNT, default=2)
    options = parser.parse_args()
    prepare(options.kernels, peers=False)
    named = {}
    for op in OPS.values():
        for impl in filter(holds_kernels, op.impls.values()):
            for number, config in enumerate(impl.configs):
                name = f"{op.name}-{impl.name}-{number}"
                if not options.only or name in options.only:
                    usual = production(op, impl.name, config).sizes
                    for dtype, target in product(options.dtypes, options.targets):
                        sizes = {**usual, "dtype": dtype}
                        named[name, dtype, target] = Call(op.name, impl.name, number, target, sizes)
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        outcomes = elsewhere(proof, list(named.values()), options.workers, options.kernels)
        for (call, dtype, target), kernels in zip(named, outcomes):
            for row in kernels:
                print(json.dumps({"call": call, "target": target, "dtype": dtype, **row}))
                wrong |= bool(row["wrong"])
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
