"""Every timed call meets the next copy of its arguments, and a call that fails gets no time.

Each test has planted faults beside it, which it finds. What only a GPU does is in tests/on_standin/test_timing.py.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import cycle, repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import ops
from bench.measure import timing
from bench.measure.cases import Case
from bench.tuner import jobs
from vila_triton.registry import OPS, discover

discover()
CPU, CACHE, X = torch.device("cpu"), 1000, torch.ones(100)
COPIES, MIN_SAMPLES = 6, 5  # 400 bytes each, and 2000 bytes between two uses of one
Plant = Callable[[pytest.MonkeyPatch], None]


def plant(name: str, fault: Any) -> Plant:
    """Replace a function that `timing` uses."""
    return lambda monkeypatch: monkeypatch.setattr(timing, name, fault)


def check_calls_meet_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: CACHE)
    addresses: list[int] = []
    found = timing.time_call(lambda x: addresses.append(x.data_ptr()), (X,), CPU, budget=0)
    assert found.cold and found.samples == MIN_SAMPLES and len(addresses) == COPIES + 2 * MIN_SAMPLES
    for i, address in enumerate(addresses):
        if address in addresses[:i]:
            calls_between = addresses[:i][::-1].index(address)
            assert calls_between * X.nbytes >= 2 * CACHE


def test_calls_meet_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    check_calls_meet_a_cold_cache(monkeypatch)


WARM: dict[str, Plant] = {
    "the first copy each time": plant("cycle", lambda copies: repeat(copies[0])),
    "each run from the first copy": plant("cycle", lambda copies: cycle(copies[:MIN_SAMPLES])),
    "copies of the same memory": plant("map_tensors", lambda fn, args: args),
    "two copies": plant("num_copies", lambda size, cache: (2, 2)),
    "half of the copies": plant("num_copies", lambda size, cache: (COPIES // 2, COPIES)),
    "no cache": plant("num_copies", lambda size, cache: (COPIES, 10 * COPIES)),
}


@pytest.mark.parametrize("name", WARM)
def test_warm_cache_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WARM[name](monkeypatch)
    with pytest.raises(AssertionError):
        check_calls_meet_a_cold_cache(monkeypatch)


def check_call_that_fails_gets_no_time(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The call of this number fails, once: in `bench.ops`, and in the tuner."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: CACHE)
    monkeypatch.setattr(ops, "random_arguments", lambda *_: (X, X))
    monkeypatch.setattr(jobs, "random_arguments", lambda *_: (X, X))
    monkeypatch.setattr(OPS["swiglu"], "impls", dict(OPS["swiglu"].impls))
    sizes, calls = {"s": 2, "f": 48, "dtype": "float32"}, [0]

    def failing(gate: Tensor, up: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == number:
            raise RuntimeError("unspecified launch failure")
        return gate

    OPS["swiglu"].impl("failing")(failing)
    peaks = timing.MachinePeaks(1e9, {"float32": 1e12})
    case = Case("swiglu", "tune", sizes)
    (row,) = ops.time_cases([case], ["failing"], False, CPU, peaks, 0, lambda *_: None)
    assert row["kind"] == "refused" and "unspecified launch failure" in row["reason"] and "seconds" not in row
    calls[0] = 0
    jobs.cached_arguments.cache_clear()
    answer = jobs.run_job(
        {"op": "swiglu", "impl": "failing", "config": {}, "sizes": sizes, "budget": 0, "stage": "time"}
    )
    assert answer.keys() == {"reason"} and "unspecified launch failure" in answer["reason"]


FIRST_TIMED = 4 + 1  # after four copies of twice as many bytes
LAST = 4 + 2 * MIN_SAMPLES


@pytest.mark.parametrize("number", [1, FIRST_TIMED, LAST])
def test_call_that_fails_gets_no_time(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_call_that_fails_gets_no_time(monkeypatch, number)


def test_time_of_a_failing_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = timing.sample_on_cpu

    def forgiving(call: Callable[..., Any], *more: Any) -> list[float]:
        def attempt(*args: Any) -> None:
            with suppress(RuntimeError):
                call(*args)

        return sample(attempt, *more)

    monkeypatch.setattr(timing, "sample_on_cpu", forgiving)
    with pytest.raises(AssertionError):
        check_call_that_fails_gets_no_time(monkeypatch, LAST)
