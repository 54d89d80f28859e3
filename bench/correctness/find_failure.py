"""Search the domain of an op for the simplest example on which an implementation fails the property test."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable

from vila_triton.registry import Impl, IntRange, Op, Unsupported

from .error_budget import DEVICE, example_strategy, shared_example
from .guarded_memory import MEMORY_LAYOUTS, MemoryLayout, MismatchError

SHRINK_SECONDS = 60.0  # seconds, counted from the first failure


@dataclass(frozen=True)
class Failure:
    """A failing call: its sizes and "seed", the memory layout of its arguments, and the exception."""

    sizes: Mapping[str, Any]
    layout: MemoryLayout
    error: Exception

    @property
    def kind(self) -> str:
        return self.error.kind if isinstance(self.error, MismatchError) else "crashed"

    @property
    def num_elements(self) -> int:
        """Elements of the tensor that is wrong, 0 if there is none."""
        actual = self.error.actual if isinstance(self.error, MismatchError) else None
        return 0 if actual is None else actual.numel()


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    calls      the sizes of the examples that were checked; empty if all were unsupported, for these `reasons`
    simplest   the simplest failing call; None if all calls match the reference
    largest    the failing call of the same kind whose wrong tensor is largest, and shows a pattern of errors best
    caveat     the reason why `simplest` may not be the simplest, or does not fail each time
    """

    calls: Sequence[Mapping[str, Any]]
    seconds: float
    reasons: frozenset[str]
    simplest: Failure | None = None
    largest: Failure | None = None
    caveat: str = ""

    @property
    def num_examples(self) -> int:
        return len(self.calls)


class DeviceLost(BaseException):
    """A kernel left the GPU unusable: whatever runs after it in this process fails too. Not for hypothesis to catch."""


def find_failure(op: Op, impl: Impl, config: Mapping[str, Any], count: int, seconds: float) -> SearchResult:
    """Check up to `count` examples, the same each time, in about so many seconds; shrink the first that fails.

    Errors: `DeviceLost`, from the failing call.
    """
    start = time.monotonic()
    end = start + seconds
    failures: dict[tuple, Failure] = {}  # the latest last
    checked: dict[tuple, Mapping[str, Any]] = {}
    reasons: set[str] = set()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(sizes=example_strategy(op), layout=st.sampled_from(MEMORY_LAYOUTS))
    def check(sizes: dict[str, Any], layout: MemoryLayout) -> None:
        nonlocal end
        sizes = {name: sizes[name] for name in (*op.domain, "seed")}  # while shrinking, hypothesis reorders them
        key = (*sizes.values(), layout)
        if time.monotonic() > end and checked and key not in failures:
            return  # out of time
        try:
            failure = run_example(op, impl, config, sizes, layout)
        except Unsupported as reason:
            reasons.add(str(reason))
            assume(False)
            return
        checked[key] = sizes
        if failure:
            if not failures:
                end = time.monotonic() + SHRINK_SECONDS
            failures.pop(key, None)
            failures[key] = failure
            raise failure.error

    caveat = ""
    try:
        check()
    except Unsatisfiable:
        pass
    except Flaky:
        caveat = "the same arguments do not fail each time"
    except Exception:  # that of a failing example, which hypothesis hands on; it is in `failures`
        if not failures:
            raise
    if not caveat and time.monotonic() > end:
        caveat = "shrinking ran out of time; simpler cases may fail too"
    if not failures:
        return SearchResult(list(checked.values()), time.monotonic() - start, frozenset(reasons))
    simplest = list(failures.values())[-1]
    with suppress(Unsupported):
        if failure := run_example(op, impl, config, largest_sizes(op, simplest.sizes), simplest.layout):
            failures[()] = failure
    largest = max((f for f in failures.values() if f.kind == simplest.kind), key=lambda f: f.num_elements)
    return SearchResult(list(checked.values()), time.monotonic() - start, frozenset(reasons), simplest, largest, caveat)


def largest_sizes(op: Op, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The same example with every axis at its upper bound."""
    return {**sizes, **{name: axis.high for name, axis in op.domain.items() if isinstance(axis, IntRange)}}


def run_example(
    op: Op, impl: Impl, config: Mapping[str, Any], sizes: Mapping[str, Any], layout: MemoryLayout
) -> Failure | None:
    """The failure of an example, or None. Errors: Unsupported, DeviceLost."""
    try:
        example = shared_example(op, **sizes)
        example.check(impl, config, layout, example.call_twice)
    except Unsupported:
        raise
    except Exception as error:  # a kernel may fail in any way at all
        if not gpu_responds():
            raise DeviceLost(str(error)) from error
        return Failure(sizes, layout, error)
    return None


def gpu_responds() -> bool:
    """True if there is no GPU, or it still responds."""
    try:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
