"""`torch.cuda` as a GPU would answer, over the tensors of `device`; importing this puts it in place."""

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from .counts import count_capture
from .device import (
    DEVICES,
    Capture,
    CudaTensor,
    DeviceCopy,
    FactoryMode,
    captures,
    cuda_generators,
    current_device,
    device_index,
    device_view,
    host_view,
    memories,
    note_wait,
)
from .gpus import properties_of
from .transfers import copy_from_host, is_asynchronous, is_pinned, pin, pin_memory, queued, wait_for

host_generator, host_tensor, host_as_tensor, host_to = torch.Generator, torch.tensor, torch.as_tensor, Tensor.to
host_attention = torch.nn.functional.scaled_dot_product_attention


class _AnyGenerator(type(host_generator)):
    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, host_generator)


class Generator(host_generator, metaclass=_AnyGenerator):
    """A generator of the CPU that says which device it was made for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        generator = host_generator.__new__(cls, "cpu")  # pyright: ignore
        if torch.device(device).type == "cuda":
            cuda_generators.add(generator._cdata)  # an operator is given another object of Python for it
            weakref.finalize(generator, cuda_generators.discard, generator._cdata)
        return generator

    def __init__(self, device: Any = "cpu") -> None: ...

    device = property(lambda self: torch.device("cuda" if self._cdata in cuda_generators else "cpu"))  # pyright: ignore


def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which in C++ makes its tensor without asking `FactoryMode`."""
    device = default_device() if device is None else torch.device(device)
    if kwargs.pop("pin_memory", False):
        return pin(host_tensor(data, **kwargs))
    values = host_tensor(data.item() if isinstance(data, CudaTensor) else data, **kwargs)
    return values if device.type == "cpu" else values.to(device)


def as_tensor(data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    """`torch.as_tensor`, which in C++ makes its tensor without asking `FactoryMode`."""
    if isinstance(data, CudaTensor):
        return data.to(device=device or data.device, dtype=dtype)
    device = default_device() if device is None else torch.device(device)
    return host_as_tensor(data, dtype=dtype, device="cpu" if device.type == "cuda" else device).to(device)


def to(self: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """`Tensor.to` of a CPU tensor, which in C++ asks the driver for the device first."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
    if device is None or device.type != "cuda":
        return host_to(self, *args, copy=copy, **kwargs)
    if self.is_meta:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    if is_asynchronous(self, self, non_blocking):
        copy_from_host(self)
    else:
        note_wait("a copy of pageable memory to the device")
    order, index = layout or torch.preserve_format, device_index(device)
    move = partial(host_to, dtype=dtype or self.dtype, copy=True, memory_format=order)
    return DeviceCopy.apply(self, lambda x: device_view(move(x), index), host_view)  # pyright: ignore


def default_device() -> torch.device:
    """Returns the device of the innermost `with torch.device(...)`, else the CPU."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((m.device for m in reversed(modes) if isinstance(m, DeviceContext)), torch.device("cpu"))


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention`, which in C++ would make the mask of causal attention on the CPU."""
    if kwargs.get("is_causal") and isinstance(query, CudaTensor):
        size = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
        kwargs["is_causal"] = False
    return host_attention(query, key, value, attn_mask, *args, **kwargs)


class Event:
    """`torch.cuda.Event` by the clock of the host."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.enable_timing, self.recorded_at, self.position = enable_timing, 0.0, 0

    def record(self, stream: Any = None) -> None:
        self.recorded_at, self.position = time.perf_counter(), queued[0]

    def synchronize(self) -> None:
        wait_for(self.position)

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds. Errors: RuntimeError unless both events were made to take times and were recorded."""
        if not (self.enable_timing and end.enable_timing and self.recorded_at and end.recorded_at):
            raise RuntimeError("Both events must be created with enable_timing=True and recorded.")
        return 1e3 * max(end.recorded_at - self.recorded_at, 1e-9)


class Stream:
    """`torch.cuda.Stream` that runs everything at once."""

    numbers = count(1)

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.cuda_stream = torch.device("cuda", device_index(device or "cuda")), next(self.numbers)

    def synchronize(self) -> None:
        note_wait("a stream")

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def __enter__(self) -> "Stream":
        self.previous = current_streams.get(self.device)
        current_streams[self.device] = self
        return self

    def __exit__(self, *_: Any) -> None:
        current_streams[self.device] = self.previous


default_streams: dict[torch.device, Stream] = {}
current_streams: dict[torch.device, Stream | None] = {}


def default_stream(device: Any = None) -> Stream:
    """`torch.cuda.default_stream`."""
    place = torch.device("cuda", device_index(device or "cuda"))
    if place not in default_streams:
        default_streams[place] = Stream(place)
        default_streams[place].cuda_stream = 0
    return default_streams[place]


def current_stream(device: Any = None) -> Stream:
    """`torch.cuda.current_stream`."""
    default = default_stream(device)
    return current_streams.get(default.device) or default


class CUDAGraph(Capture):
    """`torch.cuda.CUDAGraph` that records the calls made inside it."""

    def reset(self) -> None:
        self.calls.clear()
        self.results.clear()


@contextlib.contextmanager
def graph(
    cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """Captures a CUDA graph. Tensors computed inside hold no result before the graph is replayed: until then
    floating-point ones are NaN, integers the smallest of their type.
    """
    if captures:
        raise RuntimeError("CUDA error: a graph is captured already")
    captures.append(cuda_graph)
    try:
        with stream or contextlib.nullcontext():
            yield
    finally:
        captures.clear()
    count_capture()
    for x in cuda_graph.results:
        if x.dtype != torch.bool:
            x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min)


@contextlib.contextmanager
def device(target: Any) -> Iterator[None]:
    """`torch.cuda.device`: inside, the target, an index or a device, is the current one; None changes nothing."""
    previous = current_device[0]
    set_device(target)
    try:
        yield
    finally:
        current_device[0] = previous


def set_device(target: Any) -> None:
    """`torch.cuda.set_device`: makes an index or a device the current one; None changes nothing."""
    if target is not None:
        current_device[0] = device_index(torch.device("cuda", target) if isinstance(target, int) else target)


def synchronize(device: Any = None) -> None:
    """`torch.cuda.synchronize`: counts a wait of the host; raises RuntimeError while a graph is captured."""
    note_wait("synchronize")


def memory_of(device: Any = None) -> Any:
    """Returns the `Memory` of a device, given as torch.cuda's functions take it."""
    return memories[
        device_index("cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device)
    ]


def reset_peak_memory_stats(device: Any = None) -> None:
    """`torch.cuda.reset_peak_memory_stats`: the peak of a device becomes the bytes allocated now."""
    memory = memory_of(device)
    memory.peak = memory.allocated


CUDA_FUNCTIONS = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "device_count": lambda: DEVICES,
    "current_device": lambda: current_device[0],
    "set_device": set_device,
    "device": device,
    "is_bf16_supported": lambda including_emulation=True: True,
    "synchronize": synchronize,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: memory_of(device).allocated,
    "max_memory_allocated": lambda device=None: memory_of(device).peak,
    "memory_reserved": lambda device=None: memory_of(device).allocated,
    "max_memory_reserved": lambda device=None: memory_of(device).peak,
    "reset_peak_memory_stats": reset_peak_memory_stats,
    "mem_get_info": lambda device=None: (
        memory_of(device).total - memory_of(device).allocated,
        memory_of(device).total,
    ),
    "memory_stats": lambda device=None: {"allocated_bytes.all.current": memory_of(device).allocated},
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "current_stream": current_stream,
    "default_stream": default_stream,
    "stream": lambda stream: stream or contextlib.nullcontext(),
    "graph_pool_handle": lambda: (0, 0),
    "is_current_stream_capturing": lambda: bool(captures),
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
}
for name, answer in CUDA_FUNCTIONS.items():
    setattr(torch.cuda, name, answer)
torch.Generator, torch.tensor, torch.as_tensor = Generator, tensor, as_tensor  # pyright: ignore
torch.Tensor.to = to  # pyright: ignore
torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin_memory, is_pinned  # pyright: ignore
torch.nn.functional.scaled_dot_product_attention = attention
torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to: `param.data = x` leaves what param says
torch.Tensor.cuda = CudaTensor.cuda  # pyright: ignore
run_thread = threading.Thread.run


def become(target: str) -> None:
    """Lets `torch.cuda` answer as the GPU that stands for an architecture."""
    properties = properties_of(target, memories[0].total)
    torch.cuda.get_device_name = lambda device=None: properties.name
    torch.cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_arch_list = lambda: [target]


def run_on_standin(self: threading.Thread) -> None:
    """Runs a thread under the stand-in's dispatch mode: a mode holds for one thread only."""
    with FactoryMode():  # a mode holds for one thread
        run_thread(self)


threading.Thread.run = run_on_standin
FactoryMode().__enter__()
