"""The time of a call, and the peak rates of the machine.

A call is timed on several copies of its arguments in turn, so many that together they overflow the last-level cache
twice: every call then reads from memory, as in a model whose weights do not fit the cache. On a GPU the turn is
captured in a CUDA graph, so that the kernels are timed and not Python. Everything is timed twice; the distance of the
two medians is the noise, printed beside the figure.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import torch

from ..correctness.guarded_memory import map_tensors, tensors

MOST_COPIES = 64
CPU_CACHE = 64 * 2**20  # bytes, where the machine does not say


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the 20th and 80th percentile, and the median of a second run (`again`)."""

    seconds: float
    low: float
    high: float
    again: float
    samples: int
    cold: bool  # whether the copies overflow the cache
    graph: bool  # whether a CUDA graph was replayed

    @property
    def noise(self) -> float:
        """The distance of the second run's median from the first's, as a share of the first."""
        return abs(self.again - self.seconds) / self.seconds


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [f.read_text().strip() for f in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * {"K": 2**10, "M": 2**20}[s[-1]] for s in sizes if s[-1:] in "KM"), default=CPU_CACHE)


def num_copies(size: int, cache: int) -> tuple[int, int]:
    """Returns (copies to make, copies that would overflow the cache twice) for arguments of so many bytes."""
    needed = -(-2 * cache // size) + 1
    return max(2, min(MOST_COPIES, needed)), needed


def copies_of_args(args: Any, device: torch.device) -> tuple[list[Any], bool]:
    """Returns copies of the arguments, and whether together they overflow the cache twice."""
    size = max(1, sum(x.nbytes for x in tensors(args)))
    count, needed = num_copies(size, cache_bytes(device))
    return [args, *(map_tensors(torch.clone, args) for _ in range(count - 1))], count >= needed


def time_call(call: Callable[..., Any], args: Any, device: torch.device, budget: float = 0.2) -> Timing:
    """Times call(*args). `budget`: seconds for each of the two runs, about; at least five samples are taken."""
    arg_copies, cold = copies_of_args(args, device)
    for copy in arg_copies:  # compiles, allocates, and lets a library prepare each copy
        call(*copy)
    if device.type == "cpu":
        turns = cycle(arg_copies)  # the second run goes on where the first ended, or its first copies would be warm
        runs = [sample_on_cpu(call, turns, budget) for _ in range(2)]
        graph = False
    else:
        replay, graph = capture_cuda_graph(call, arg_copies)
        runs = [sample_on_gpu(replay, len(arg_copies), budget) for _ in range(2)]
    samples = sorted(runs[0])
    low, high = (samples[int(share * (len(samples) - 1))] for share in (0.2, 0.8))
    return Timing(statistics.median(samples), low, high, statistics.median(runs[1]), len(samples), cold, graph)


def sample_on_cpu(call: Callable[..., Any], turns: Iterator[Any], budget: float) -> list[float]:
    """Returns seconds per call, one sample per call, each with the next arguments of endless `turns`."""
    samples: list[float] = []
    end = time.perf_counter() + budget
    while len(samples) < 5 or time.perf_counter() < end:
        copy = next(turns)
        start = time.perf_counter()
        call(*copy)
        samples.append(time.perf_counter() - start)
    return samples


def capture_cuda_graph(call: Callable[..., Any], copies: Sequence[Any]) -> tuple[Callable[[], Any], bool]:
    """Captures one turn over the copies as a CUDA graph; returns its replay, or plain calls if the call waits for the
    device.
    """

    def call_copies() -> None:
        for copy in copies:
            call(*copy)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call_copies()
    except RuntimeError:
        torch.cuda.synchronize()
        return call_copies, False
    return graph.replay, True


def sample_on_gpu(replay: Callable[[], Any], calls: int, budget: float) -> list[float]:
    """Returns seconds per call, one sample per turn."""
    samples: list[float] = []
    replay()
    torch.cuda.synchronize()
    end = time.perf_counter() + budget
    while len(samples) < 5 or time.perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3 / calls)
    return samples


@dataclass(frozen=True)
class MachinePeaks:
    """The rates that this machine reached just now: bytes per second of reads or copies, FLOP/s of a matrix product by
    dtype.
    """

    bandwidth: float
    flops: dict[str, float]  # by dtype


def measure_peaks(device: torch.device, dtypes: Iterable[str] = ("float32", "float16", "bfloat16")) -> MachinePeaks:
    """Measures the peak rates with torch: the faster of summing and copying much memory, and the product of two square
    matrices.

    The memory is 32 times the cache (at most 2 GiB); the matrices have so many rows, 512 to 8192, that a product takes
    a millisecond.
    """
    size = min(32 * cache_bytes(device), 2**31)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    reads = min_seconds(lambda: source.sum(), device)
    copies = min_seconds(lambda: target.copy_(source), device)
    bandwidth = max(source.nbytes / reads, 2 * source.nbytes / copies)
    return MachinePeaks(bandwidth, {dtype: matmul_flops(device, getattr(torch, dtype)) for dtype in dtypes})


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a product of two square matrices."""
    n, seconds = 256, 0.0
    while seconds < 1e-3 and n < 8192:
        n *= 2
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = min_seconds(lambda a=a, b=b: a @ b, device)
    return 2 * n**3 / seconds


def min_seconds(call: Callable[[], Any], device: torch.device, budget: float = 0.3) -> float:
    """Returns the least seconds of a call."""
    call()
    if device.type == "cpu":
        return min(sample_on_cpu(call, repeat(()), budget))
    return min(sample_on_gpu(call, 1, budget))
