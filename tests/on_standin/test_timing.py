"""Times of a GPU: a graph holds a call of every copy, a sample is the time of one call, and a failure gets no time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import timing

COPIES = 5  # of arguments as large as half the stand-in's cache
SECONDS_A_TURN = 0.01
capture, sample = timing.capture_cuda_graph, timing.sample_on_gpu


def check_every_copy_is_replayed(monkeypatch: pytest.MonkeyPatch, call: Callable[[Tensor], Any]) -> timing.Timing:
    """`call` adds 1 to its argument, so that a copy says how often it was used."""
    x = torch.zeros(torch.cuda.get_device_properties("cuda").L2_cache_size // 8, device="cuda")
    copies, cold = timing.copies_of_args((x,), x.device)
    assert len(copies) == COPIES and cold
    monkeypatch.setattr(timing, "copies_of_args", lambda *_: (copies, cold))
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda start, end: 1e3 * SECONDS_A_TURN)
    found = timing.time_call(call, (x,), x.device, budget=0)
    uses = [int(copy[0]) for (copy,) in copies]
    assert len(set(uses)) == 1 and uses[0] > 2 * found.samples
    assert found.seconds == found.again == pytest.approx(SECONDS_A_TURN / COPIES)
    return found


def add_one(x: Tensor) -> None:
    x.add_(1)


def add_one_and_wait(x: Tensor) -> None:
    x.add_(1)
    x[0].item()


def test_every_copy_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_every_copy_is_replayed(monkeypatch, add_one).graph


def test_every_copy_is_used_by_a_call_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not check_every_copy_is_replayed(monkeypatch, add_one_and_wait).graph


FAULTS: dict[str, tuple[str, Any]] = {
    "the first copy only": ("capture_cuda_graph", lambda call, copies: capture(call, copies[:1])),
    "one copy too few": ("capture_cuda_graph", lambda call, copies: capture(call, copies[1:])),
    "the time of a turn": ("sample_on_gpu", lambda replay, calls, budget: sample(replay, 1, budget)),
    "no call": ("sample_on_gpu", lambda replay, calls, budget: sample(lambda: None, calls, budget)),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("call", [add_one, add_one_and_wait])
def test_fault_is_found(name: str, call: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, *FAULTS[name])
    with pytest.raises(AssertionError):
        check_every_copy_is_replayed(monkeypatch, call)


@pytest.mark.parametrize("name", ["synchronize", "record"])
def test_launch_that_fails_while_it_is_timed_gets_no_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU says so when the host waits for it, or at the next launch."""

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda.Event, name, fail)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        timing.time_call(add_one, (torch.zeros(8, device="cuda"),), torch.device("cuda"), budget=0)
