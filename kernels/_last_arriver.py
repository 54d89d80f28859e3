"""One launch in place of two: programs leave partial results in memory, and the one that arrives last adds them up.

Every program stores its part, then counts itself; whoever counts to the end finds all parts in memory and reads them
in the order of the splits, so that the result has the same bits whoever came last. A counter is 0 before a launch and
after it, so that a captured graph replays.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.registry.search_space import next_power_of_2

FEWEST = 4096  # counters of a new array: 16 KiB, more than most launches need
_ARRAYS: dict[tuple[torch.device, int], list[Tensor]] = {}


def _key(device: torch.device) -> tuple[torch.device, int]:
    if device.type == "cuda":
        return device, torch.cuda.current_stream(device).cuda_stream
    return device, threading.get_ident()


def arrival_counters(device: torch.device, count: int) -> Tensor:
    """`count` counters or more, int32, all 0: for a launch on the current stream of `device` that leaves them at 0.

    Each stream has its own, as its launches follow one another; so has each thread on a CPU. They are kept for the next
    launch, and those that became too few are kept too, as captured graphs know their addresses: graphs that were
    captured on one stream must not be replayed at the same time. A capture on a stream where there are none yet zeroes
    some of its own, in a further launch at every replay; whoever warms up on the stream that captures has none.
    """
    key = _key(device)
    arrays = _ARRAYS.get(key, [])
    if arrays and arrays[-1].numel() >= count:
        return arrays[-1]
    size = max(FEWEST, next_power_of_2(count))
    if device.type == "cpu":
        counters = torch.from_numpy(np.zeros(size, np.int32))  # takes memory only where a program counts itself
    else:
        counters = torch.zeros(size, dtype=torch.int32, device=device)
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _ARRAYS[key] = [*arrays, counters]
    return counters


@contextmanager
def counting(device: torch.device) -> Iterator[None]:
    """Around a launch that counts arrivals. One that is interpreted or emulated can end in an error between two
    programs: its counters are then forgotten, as they would let later launches add up too early or never.
    """
    try:
        yield
    except BaseException:
        if device.type == "cpu":  # on a GPU nothing was launched, and graphs may know the counters
            _ARRAYS.pop(_key(device), None)
        raise


@triton.jit
def arrives_last(counter_ptr, count):
    """True in the last of `count` programs that call this with one counter, after all of their stores, which this one
    may then load; it sets the counter to 0.

    The barrier puts the stores of all threads before the count, whose release and acquire pass them on from program to
    program; what all threads are told of the count waits for it in turn.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.debug_barrier()
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last
