"""Launches of Triton kernels by plan: what an implementation allocated and launched for one signature, done again.

An implementation works grids, strides and constants out of its arguments, and Triton works out of all of them which
compiled kernel they need: forty times what the call of the driver costs. So the third call of a signature (see
`signature`) is recorded: new tensors, and launches with the compiled kernel, the grid and where each argument came
from. Later calls do just that. What is not understood to the last argument, such as a copy by torch, is not planned.

That holds since an implementation that launches kernels reads no numbers of tensors, which would wait for the GPU, and
keeps nothing between calls but what belongs to a stream. Launches that someone watches or replaces (a profiler, the
emulator) go the usual way.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CALLS_BEFORE = 2  # of a signature, before one is recorded: what is compiled or tuned at first is left out
CONSTANTS = (int, float, bool, str, type(None), triton.language.dtype)
RECORDING = threading.Lock()  # held by the thread that records: `JITFunction.run` is one for all
NEW_TENSORS = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}


class NotPlanned(Exception):
    """The call did what no plan can repeat."""


@dataclass(frozen=True)
class Value:
    """A tensor of a call: the arguments' come first, then the new ones."""

    index: int


@dataclass(frozen=True)
class View:
    """A view of a tensor of a call; `offset` counts from its first element."""

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def taken_from(self, values: Sequence[Tensor]) -> Tensor:
        """The view, of the tensors of another call."""
        base = values[self.index]
        return base.as_strided(self.shape, self.strides, base.storage_offset() + self.offset)


@dataclass(frozen=True)
class Argument:
    """An argument of the call itself, by its position."""

    index: int


@dataclass(frozen=True)
class Launch:
    """A launch. args: those of the kernel, with holes. values: (position, index) of arguments that are tensors of the
    call; sources: (position, source) of others that differ from call to call.
    """

    compiled: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    values: tuple[tuple[int, int], ...]
    sources: tuple[tuple[int, Any], ...]


@dataclass(frozen=True)
class Plan:
    """The new tensors, launches and results of a call."""

    new_tensors: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]
    launches: tuple[Launch, ...]
    result: Any

    def run(self, tensors: Sequence[Tensor], args: Sequence[Any], stream: Any) -> Any:
        """Launch on a stream, for a call with these arguments, which hold these tensors."""
        values = [*tensors]
        for shape, dtype, device in self.new_tensors:
            values.append(torch.empty(shape, dtype=dtype, device=device))
        for launch in self.launches:
            filled, compiled = [*launch.args], launch.compiled
            for i, index in launch.values:
                filled[i] = values[index]
            for i, source in launch.sources:
                filled[i] = resolve(source, values, args)
            x, y, z = launch.grid
            compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *filled)
        return resolve(self.result, values, args)


def resolve(source: Any, values: Sequence[Tensor], args: Sequence[Any]) -> Any:
    """A part of a call out of its tensors and arguments."""
    kind = type(source)
    if kind is Value:
        return values[source.index]
    if kind is tuple:
        return tuple([resolve(part, values, args) for part in source])
    if kind is View:
        return source.taken_from(values)
    if kind is Argument:
        return args[source.index]
    if isinstance(source, tuple):
        return kind(*(resolve(part, values, args) for part in source))
    return source


class Recorder(TorchDispatchMode):
    """Watches a call whose arguments hold `tensors`. What it makes is kept alive, so that no address is used twice."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.values = list(tensors)
        self.num_tensors = len(tensors)
        self.launches: list[tuple[Any, Any, Any, tuple[Any, ...], dict[str, Any]]] = []
        self.unplanned = ""
        addresses = [x.data_ptr() for x in tensors]
        if len(set(addresses)) < len(addresses) or 0 in addresses:
            self.unplanned = "tensors without an address of their own"  # which of them a kernel is given is not known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in NEW_TENSORS and out.is_contiguous():
            self.values.append(out)
        elif not is_view(func):
            self.unplanned = str(func)
        return out

    def find(self, x: Tensor) -> Any:
        """Where a tensor came from; one that was there before the call stands for itself."""
        for i, value in enumerate(self.values):
            if x.data_ptr() == value.data_ptr() and x.dtype == value.dtype:
                return Value(i)
        memory = x.untyped_storage().data_ptr()
        owners = [i for i, value in enumerate(self.values) if value.untyped_storage().data_ptr() == memory]
        if len(owners) > 1:  # in another call they may lie elsewhere, each for itself
            raise NotPlanned("a part of memory that several arguments share")
        return view_of(owners[0], self.values[owners[0]], x) if owners else x

    def source(self, x: Any) -> Any:
        """The source of an argument of a kernel."""
        if isinstance(x, Tensor):
            return self.find(x)
        if isinstance(x, tuple):
            parts = [self.source(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        if not isinstance(x, CONSTANTS):
            raise NotPlanned(f"a kernel's argument of type {type(x).__name__}")
        return x

    def result(self, x: Any, args: Sequence[Any]) -> Any:
        """The source of a result: an argument as it is, or a new tensor, as another view if need be."""
        for i, arg in enumerate(args):
            if x is arg and x is not None:
                return Argument(i)
        if type(x) is tuple:
            return tuple(self.result(part, args) for part in x)
        if x is None:
            return None
        if type(x) is not Tensor:
            raise NotPlanned(f"a result of type {type(x).__name__}")
        for i, value in enumerate(self.values[self.num_tensors :], self.num_tensors):
            if x.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
                same = x.shape == value.shape and x.stride() == value.stride() and x.data_ptr() == value.data_ptr()
                return Value(i) if same else view_of(i, value, x)
        raise NotPlanned("a result that is not new")

    def plan(self, result: Any, args: Sequence[Any]) -> Plan:
        """The plan of what was watched. Errors: `NotPlanned`."""
        if self.unplanned or not self.launches:
            raise NotPlanned(self.unplanned or "nothing was launched")
        launches = tuple(self.plan_launch(*launch) for launch in self.launches)
        results = self.result(result, args)
        new = [(tuple(x.shape), x.dtype, x.device) for x in self.values[self.num_tensors :]]
        if type(results) is View and results.offset == 0 and result.is_contiguous():
            i = results.index - self.num_tensors
            if result.numel() == self.values[results.index].numel():  # kernels are given no shapes
                new[i], results = (tuple(result.shape), *new[i][1:]), Value(results.index)
        return Plan(tuple(new), launches, results)

    def plan_launch(self, kernel: Any, compiled: Any, grid: Any, args: Any, kwargs: dict[str, Any]) -> Launch:
        """The plan of one launch."""
        rest = (kwargs.get(p.name, p.default) for p in kernel.params[len(args) :])
        pairs = zip(kernel.params, (*args, *rest), strict=True)
        sources = [x if p.is_constexpr and not holds_tensor(x) else self.source(x) for p, x in pairs]
        values = tuple((i, x.index) for i, x in enumerate(sources) if type(x) is Value)
        others = tuple((i, x) for i, x in enumerate(sources) if holds_tensor(x) and type(x) is not Value)
        constants = tuple(None if holds_tensor(x) else x for x in sources)
        x, y, z = (*grid, 1, 1)[:3]
        return Launch(compiled, (x, y, z), constants, values, others)


def view_of(index: int, value: Tensor, x: Tensor) -> View:
    """x as a view of a value of the call. Errors: `NotPlanned` if it is read as another dtype."""
    if x.dtype != value.dtype:
        raise NotPlanned(f"a view of {value.dtype} as {x.dtype}")
    return View(index, tuple(x.shape), x.stride(), int(x.storage_offset() - value.storage_offset()))


def holds_tensor(source: Any) -> bool:
    """Return True for sources that differ from call to call."""
    return type(source) in (Value, View) or (isinstance(source, tuple) and any(map(holds_tensor, source)))


def is_view(func: Any) -> bool:
    """Return True if an operator of torch returns another view of its argument, and writes nothing."""
    returns = [x.alias_info for x in func._schema.returns]
    aliases = [*returns, *(x.alias_info for x in func._schema.arguments)]
    return bool(returns) and returns[0] is not None and not any(a and a.is_write for a in aliases)


def is_watched(hook: Any) -> bool:
    """Return True if a hook of Triton's launches does something."""
    return hook is not None and bool(getattr(hook, "calls", True))


def launches_as_usual() -> bool:
    """Return True unless launches are watched or replaced."""
    runtime = knobs.runtime
    return (
        JITFunction.run.__module__ == JITFunction.__module__
        and runtime.add_stages_inspection_hook is None
        and not is_watched(runtime.launch_enter_hook)
        and not is_watched(runtime.launch_exit_hook)
    )


@contextmanager
def recording(recorder: Recorder) -> Any:
    """Let a recorder see the launches of this thread and the operators of torch."""
    thread, run = threading.get_ident(), JITFunction.run

    def watched_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        if threading.get_ident() == thread:
            if warmup or callable(grid) or self.pre_run_hooks:
                recorder.unplanned = "a launch with a function for its grid, or none at all"
            recorder.launches.append((self, compiled, grid, args, kwargs))
        return compiled

    with patch.object(JITFunction, "run", watched_run), recorder:
        yield


class LaunchPlans:
    """The plans of one signature and implementation, by stream and thread: what launches share belongs to these."""

    def __init__(self) -> None:
        self.plans: dict[Any, Plan | int] = {}  # a plan, or the number of calls so far; -1 if there can be none
        self.has_driver = not knobs.runtime.interpret

    def run(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        config: Mapping[str, Any],
        tensors: Sequence[Tensor],
    ) -> Any:
        """Return fn(*args, **kwargs, **config), which is called itself unless there is a plan of it.

        tensors: those that the arguments hold, in one order for all calls.
        """
        if not self.has_driver or not launches_as_usual():
            return fn(*args, **kwargs, **config)
        try:
            active: Any = driver.active
        except RuntimeError:  # so nothing that it calls launches a kernel
            self.has_driver = False
            return fn(*args, **kwargs, **config)
        device = active.get_current_device()
        stream = active.get_current_stream(device)
        where = active, device, stream, threading.get_ident()
        plan = self.plans.get(where, 0)
        if isinstance(plan, Plan):
            return plan.run(tensors, (*args, *kwargs.values()), stream)
        if plan < CALLS_BEFORE:
            self.plans[where] = plan if plan < 0 else plan + 1
            return fn(*args, **kwargs, **config)
        if not RECORDING.acquire(blocking=False):  # another time
            return fn(*args, **kwargs, **config)
        try:
            recorder = Recorder(tensors)
            with recording(recorder):
                result = fn(*args, **kwargs, **config)
        finally:
            RECORDING.release()
        try:
            self.plans[where] = recorder.plan(result, (*args, *kwargs.values()))
        except NotPlanned:
            self.plans[where] = -1
        return result
