"""Compiles the Triton kernels of a call for a GPU this machine need not have.

The launchers themselves run, on tensors without data (device "meta") and under a Triton driver that only names its
target. So a kernel is compiled exactly as it is called, and a new file of `kernels/` needs no entry anywhere.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import active_children, get_context
from typing import Any, Generic, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from vila_triton import kernels as kernels_package
from vila_triton.registry import OPS, Impl, Unsupported, describe_available, discover
from vila_triton.registry.sources import kernel_paths

from .gpus import TARGETS

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CompileRequest:
    """A call of an implementation at given sizes that is to be compiled for a target. `config` is a config of the
    implementation or its index in `Impl.configs`.
    """

    op: str
    impl: str
    config: Mapping[str, Any] | int
    target: str
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class CompileResult(Generic[Result]):
    """The results of `analyze` for each kernel that the call launched with `config`, or the reason why it launched
    none: the launcher does not support the arguments, or an exception in one text.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    kernels: list[Result] = field(default_factory=list)
    unsupported: str = ""
    error: str = ""


class CrossCompileDriver(DriverBase):
    """The part of a Triton driver that compilation asks for. Each target counts as a device of its own, since Triton
    caches kernels by device.
    """

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
    """Inside the `with`, launching a kernel calls launch(kernel, *args, **kwargs) instead. An autotuned kernel takes
    its first config.
    """

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
    """Returns the implementation and the config of a request. Errors: ValueError if there is no such one."""
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
    """Returns example arguments of these sizes on the meta device, so that large tensors take no memory."""
    return OPS[op].make_example(**dict(sizes), rng=torch.Generator().manual_seed(0), device="meta")


def compile_request(analyze: Callable[[Any], Result], request: CompileRequest) -> CompileResult[Result]:
    """Compiles the kernels that a call launches and applies `analyze` to each of Triton's compiled kernels, which have
    `.asm` and `.metadata`.
    """
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


def load_implementations(folder: str | None, peers: bool, paths: Sequence[str] = ()) -> dict[str, str]:
    """Registers the implementations of `folder`, or of kernels/ if there is none, those of `paths`, and with `peers`
    those of other libraries. Returns {library: reason} of those libraries that cannot be used here.

    Errors: ValueError for a folder beside paths, which were discovered with kernels/.
    """
    if folder:
        if kernel_paths():
            raise ValueError("--kernels adds to kernels/, and --replace-kernels takes others: expected one of the two")
        kernels_package.__path__[:] = [folder]
    discover(*paths)
    if not peers:
        return {}
    from ..peers import discover_peers

    return discover_peers()


def run_in_subprocesses(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int = 2,
    folder: str | None = None,
    peers: bool = False,
) -> Iterator[Result]:
    """Yields work(item) of each item, in order, computed in processes in which the implementations are registered and
    no kernel is interpreted. Ctrl-C reaches this process only, which then ends the others.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # a process inherits what is set as it starts
    other_children = set(active_children())
    pool = ProcessPoolExecutor(workers, get_context("spawn"), load_implementations, (folder, peers, kernel_paths()))
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
