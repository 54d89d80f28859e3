"""Copies that the host does not wait for are there when it has waited, and not before; what is counted of them."""

import pytest
import torch
from torch import Tensor

from bench import standin

if standin.is_active():
    from bench.standin.counts import counting

PINNED_ON_THE_WAY = torch.iinfo(torch.int64).min


def to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A pinned tensor that x is copied to, and the event behind the copy."""
    host, copied = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    copied.record()
    return host, copied


def test_pinned_copy_has_the_values_of_its_place_in_the_stream_once_waited_for() -> None:
    x = torch.arange(3, device="cuda")
    with counting() as counts:
        host, copied = to_host(x)
        assert host.tolist() == [PINNED_ON_THE_WAY] * 3
        x.add_(1)
        assert not counts.waits
        copied.synchronize()
    assert host.tolist() == [0, 1, 2]
    assert counts.overlapped_waits.total() == 1 and not counts.waits and not counts.allocations


def test_wait_for_the_last_thing_queued_counts() -> None:
    with counting() as counts:
        _, copied = to_host(torch.ones(2, device="cuda"))
        copied.synchronize()
    assert [what for what, _ in counts.waits] == ["an event"] and not counts.overlapped_waits


def test_waits_of_other_kinds_finish_copies_too() -> None:
    x = torch.ones(2, device="cuda")
    host, _ = to_host(x)
    x.sum().item()
    assert host.tolist() == [1, 1]


def test_pinned_memory_written_under_a_copy_to_the_device_is_found() -> None:
    host, x = torch.zeros(2).pin_memory(), torch.empty(2, device="cuda")
    x.copy_(host, non_blocking=True)
    host[1] = 1
    with pytest.raises(RuntimeError, match="written while a copy of it to the device was under way"):
        torch.cuda.synchronize()
    x.copy_(host, non_blocking=True)
    del host  # torch's allocator waits for the copy before it gives the memory to anyone
    torch.cuda.synchronize()
    assert x.tolist() == [0, 1]


def test_copies_of_pageable_memory_and_of_blocking_calls_wait() -> None:
    x = torch.empty(2, device="cuda")
    with counting() as counts:
        x.copy_(torch.ones(2), non_blocking=True)
        x.copy_(torch.ones(2).pin_memory())
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    assert sum(counts.waits.values()) == 2


def test_pinned_copy_is_refused_inside_a_graph() -> None:
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="pinned memory is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        to_host(x)


def test_captures_replays_and_allocations_are_counted() -> None:
    x, y, graph = torch.ones(2, device="cuda"), torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()
    with counting() as counts:
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            y.copy_(x * 2)
        allocated = counts.allocations.total()
        for _ in range(3):
            graph.replay()
    assert (counts.captures, counts.replays) == (1, 3) and y.tolist() == [2, 2]
    assert allocated == counts.allocations.total() == 1


def test_streams_nest_and_the_default_one_is_0() -> None:
    outer, inner = torch.cuda.Stream(), torch.cuda.Stream()
    found = [torch.cuda.current_stream()]
    with torch.cuda.stream(outer):
        with torch.cuda.stream(inner):
            found.append(torch.cuda.current_stream())
        found.append(torch.cuda.current_stream())
    found.append(torch.cuda.current_stream())
    default = torch.cuda.default_stream()
    assert found == [default, inner, outer, default]
    assert len({x.cuda_stream for x in found}) == 3 and default.cuda_stream == 0
