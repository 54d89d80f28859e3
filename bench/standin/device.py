"""The tensor of the stand-in: it says cuda:N, its values lie in CPU memory, and its operators refuse what CUDA's
refuse.

Every operator arrives at `dispatch`: from the tensor's class, or from `FactoryMode` for operators that take no tensor
and make one.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .counts import count_allocation, count_operator, count_replay, count_wait
from .division import divide_by_reciprocal, divide_by_reciprocal_
from .transfers import copy_from_host, copy_to_host, finish_transfers, is_asynchronous, pin, queued

DEVICES = 2
MEMORY = 80 * 2**30  # bytes of each device

# Operators that read a value back, and so wait until the device has done all it was given.
WAITING = {
    "_local_scalar_dense": "item()",
    "is_nonzero": "bool()",
    "equal": "torch.equal",
    "allclose": "torch.allclose",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
}
CROSS_DEVICE = ("copy_", "_to_copy", "_copy_from", "set_")  # between devices by their nature
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot")  # of floating-point numbers only
JOINING = ("cat", "stack")  # which take no number in place of a tensor
CPU_ONLY = ("_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu", "mkldnn_linear")


@dataclass
class Memory:
    """Bytes of the tensors of one device: allocated now, at the peak, and in total."""

    total: int = MEMORY
    allocated: int = 0
    peak: int = 0
    storages: set[int] = field(default_factory=set)

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        if self.allocated + size > self.total:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes; {self.total - self.allocated} of {self.total} "
                "are free."
            )
        count_allocation()
        self.storages.add(key)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.allocated -= size


class Capture:
    """The calls made while a CUDA graph was captured; they are made again when it is replayed."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], list[Tensor]]] = []  # with their results, as CPU tensors
        self.results: list[Tensor] = []  # in memory of their own

    def replay(self) -> None:
        count_replay()
        queued[0] += 1
        for call, results in self.calls:
            again = call()
            for old, new in zip(results, tensors_in((again,)) if results else ()):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(host_view(new))


memories = [Memory() for _ in range(DEVICES)]
captures: list[Capture] = []  # the one under way
cuda_generators: set[int] = set()  # by the address of what they wrap
current_device = [0]  # the device that kernels start on


def note_wait(operation: str) -> None:
    """Counts that the host waits for the device. Errors: RuntimeError while a graph is captured."""
    count_wait(operation)
    if captures:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({operation})")
    finish_transfers()


class CudaTensor(torch.Tensor):
    """A tensor of the stand-in."""

    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    # C++ takes the tensor for one of the CPU, so what depends on its device is said here.
    device = property(lambda self: torch.device("cuda", self.index))  # pyright: ignore
    is_cuda = property(lambda self: True)  # pyright: ignore
    is_cpu = property(lambda self: False)  # pyright: ignore

    @property
    def data(self) -> Tensor:  # pyright: ignore
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, CudaTensor) or new.index != self.index:
            raise RuntimeError(f"incompatible tensor type: data of {new.device} for a tensor of {self.device}")
        torch.Tensor.data.__set__(self, host_view(new))  # pyright: ignore

    def get_device(self) -> int:
        return self.index

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
        dtype = dtype or self.dtype
        if device is None or (device.type == "cuda" and device_index(device) == self.index):
            return self if dtype == self.dtype and not copy else super().to(dtype, copy=copy)
        if device.type == "cuda":
            index, back = device_index(device), self.index
            return DeviceCopy.apply(
                self,
                lambda x: device_view(host_view(x).to(dtype, copy=True), index),
                lambda x: device_view(host_view(x), back),
            )  # pyright: ignore
        if device.type == "cpu":
            note_wait("a copy to the CPU")
            back = self.index
            return DeviceCopy.apply(self, lambda x: host_view(x).to(dtype, copy=True), lambda x: device_view(x, back))  # pyright: ignore
        return host_view(self).to(device, dtype)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def tolist(self) -> Any:
        note_wait("tolist()")
        return host_view(self).tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    def __deepcopy__(self, memo: Any) -> Tensor:
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return host_view(self).__reduce_ex__(protocol)  # as a file that is read with map_location="cpu"

    def __repr__(self, **kwargs: Any) -> str:  # pyright: ignore
        return f"{host_view(self)!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if not self.dim() else repr(self), spec)


class DeviceCopy(torch.autograd.Function):
    """A copy to another device that is differentiable: its gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return move(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.back(gradients[0]), None, None


def device_index(device: Any) -> int:
    """Returns the index of a device, that of the current one if it names none. Errors: RuntimeError beyond the last."""
    index = torch.device(device).index
    if index is not None and index >= DEVICES:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({index}, of {DEVICES} devices)")
    return current_device[0] if index is None else index


def host_view(x: Tensor) -> Tensor:
    """Returns the same memory as a CPU tensor."""
    if not isinstance(x, CudaTensor):
        return x
    with torch._C._DisableTorchDispatch():
        return x.detach()


def device_view(x: Tensor, index: int) -> CudaTensor:
    """Returns the same memory as a tensor of a device of the stand-in."""
    if isinstance(x, CudaTensor):
        return x
    if x.numel():
        memories[index].add(x.untyped_storage())
    tensor = torch.Tensor._make_subclass(CudaTensor, x)
    tensor.index = index
    return tensor


class FactoryMode(TorchDispatchMode):
    """Intercepts operators that take no tensor of the stand-in but may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator as CUDA would: refuses what CUDA refuses, counts waits, and returns tensors of the device."""
    operands = tensors_in(args) + tensors_in(kwargs.values())
    device_tensors = [x for x in operands if isinstance(x, CudaTensor)]
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    check_generator(kwargs.get("generator"), target, bool(device_tensors))
    if not device_tensors and (target is None or target.type != "cuda"):
        return (
            pin(func(*args, **{**kwargs, "pin_memory": False})) if kwargs.get("pin_memory") else func(*args, **kwargs)
        )
    name = func.overloadpacket.__name__
    count_operator(name)
    queued[0] += 1
    if name == "copy_" and is_asynchronous(args[0], args[1], any((*args[2:], *kwargs.values()))):
        return copy_asynchronously(args[0], args[1])
    if name in CPU_ONLY:
        raise NotImplementedError(f"Could not run 'aten::{name}' with arguments from the 'CUDA' backend.")
    if name in PRODUCTS and not (device_tensors[0].is_floating_point() or device_tensors[0].is_complex()):
        raise RuntimeError(f"\"{name}_cuda\" not implemented for '{device_tensors[0].dtype}'")
    index = (
        device_index(target)
        if target is not None and target.type == "cuda"
        else device_tensors[0].index
        if device_tensors
        else 0
    )
    check_devices(name, args, operands, device_tensors)
    count_waits(func, name, args, kwargs, device_tensors)
    if target is not None and target.type == "cuda":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    run = (
        {"div": divide_by_reciprocal, "div_": divide_by_reciprocal_}[name]
        if divides_by_host_number(name, args, kwargs)
        else func
    )
    if target is not None and target.type == "meta":
        return run(*tree_map(lambda x: host_view(x) if isinstance(x, CudaTensor) else x, args), **kwargs)

    # A graph knows addresses: not what a tensor is made to stand for later.
    given = tree_map(lambda x: host_view(x) if isinstance(x, CudaTensor) else x, (args, kwargs)) if captures else None

    def call() -> Any:
        run_args, run_kwargs = given or (args, kwargs)
        try:
            with torch._C._DisableTorchDispatch():
                return run(*run_args, **run_kwargs)
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise torch.OutOfMemoryError(f"CUDA out of memory. {error}") from None
            raise

    if captures:
        written = [arg for schema, arg in zip(func._schema.arguments, args) if is_written(schema)]
        written += [kwargs[s.name] for s in func._schema.arguments if is_written(s) and s.name in kwargs]
        if written:
            captures[0].calls.append((call, []))
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
    result = tree_map(lambda x: device_view(x, index) if isinstance(x, Tensor) else x, call())
    if captures:
        results = tensors_in((result,))
        captures[0].calls.append((call, [host_view(x) for x in results]))
        operand_storages = {x.untyped_storage()._cdata for x in operands}
        captures[0].results += [x for x in results if x.untyped_storage()._cdata not in operand_storages]
    return result


def copy_asynchronously(target: Tensor, source: Tensor) -> Tensor:
    """Copies between the device and pinned memory; the host does not wait. Errors: RuntimeError while a graph is
    captured, which would copy from and to the same memory at every replay.
    """
    if captures:
        raise RuntimeError("a copy of pinned memory is captured in a graph")
    if isinstance(target, CudaTensor):
        copy_from_host(source)
        host_view(target).copy_(source)
    else:
        copy_to_host(target, host_view(source))
    return target


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among values of an operator's arguments, those in lists of them too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def is_written(argument: Any) -> bool:
    """Returns whether the operator's schema says that it writes to an argument."""
    return argument.alias_info is not None and argument.alias_info.is_write


def check_generator(generator: Any, target: torch.device | None, on_device: bool) -> None:
    """Checks that random numbers are drawn by a generator of their device. Errors: RuntimeError."""
    if generator is None:
        return
    expected = "cuda" if on_device or (target is not None and target.type == "cuda") else "cpu"
    if target is not None and target.type == "meta":
        return
    actual = "cuda" if generator._cdata in cuda_generators else "cpu"
    if actual != expected:
        raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{actual}'")


def check_devices(name: str, args: Any, operands: Sequence[Tensor], device_tensors: Sequence[CudaTensor]) -> None:
    """Checks that all operands are on one device. A CPU tensor without axes counts as a number, indices may lie on the
    CPU whatever they index, and copies cross devices. Errors: RuntimeError.
    """
    if name in CROSS_DEVICE:
        return
    exempt = [x for x in args[1] if x is not None] if name in INDEXING else []
    if any(isinstance(x, CudaTensor) and x.device != args[0].device for x in exempt):
        raise RuntimeError(
            f"indices should be either on cpu or on the same device as the indexed tensor ({args[0].device})"
        )
    devices = {
        str(x.device)
        for x in operands
        if not any(x is y for y in exempt) and (isinstance(x, CudaTensor) or x.dim() or name in JOINING)
    }
    if device_tensors and len(devices) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(devices, reverse=True))}! ({name})"
        )


def count_waits(func: Any, name: str, args: Any, kwargs: Any, device_tensors: Sequence[CudaTensor]) -> None:
    """Counts the operator if it makes the host wait for the device."""
    if name in WAITING and device_tensors:
        note_wait(WAITING[name])
    elif name == "_to_copy" and not device_tensors and args[0].device.type == "cpu":
        note_wait("a copy of pageable memory to the device")
    elif name == "copy_":
        if not isinstance(args[0], CudaTensor):
            note_wait("a copy to the CPU")
        elif not isinstance(args[1], CudaTensor) and args[1].dim():
            note_wait("a copy of pageable memory to the device")
    elif name in INDEXING:
        for x in args[1]:
            if x is not None and x.dtype in (torch.bool, torch.uint8):
                note_wait("indexing by a mask")
            elif x is not None and not isinstance(x, CudaTensor) and x.dim():
                note_wait("indexing by a tensor of the CPU")
    elif name == "repeat_interleave" and isinstance(args[-1], CudaTensor) and kwargs.get("output_size") is None:
        note_wait("repeat_interleave without output_size")


def divides_by_host_number(name: str, args: Any, kwargs: Any) -> bool:
    """Returns whether CUDA multiplies by a reciprocal here: floating-point numbers divided by a number of the host."""
    if name not in ("div", "div_") or kwargs or not isinstance(args[0], Tensor):
        return False
    host = not isinstance(args[1], CudaTensor) and (not isinstance(args[1], Tensor) or not args[1].dim())
    return host and args[0].is_floating_point()
