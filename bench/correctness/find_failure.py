"""Search for the simplest example on which an implementation fails the property test."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from vila_triton.registry import Impl, IntRange, OneOf, Op, Unsupported

from .compiled_calls import compiled_for
from .error_budget import DEVICE, UNSUPPORTED_DTYPES
from .example_plan import ExamplePlan, planned_example
from .guarded_memory import MEMORY_LAYOUTS, MemoryLayout, MismatchError
from .tiles import TileCoverage, recorded_launches

SHRINK_SECONDS = 60.0  # seconds, counted from the first failure
MAX_DRAWS = 10  # for each example that is asked for: of an implementation that supports little, most are unsupported


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

    num_examples  how many were checked; 0 if all were unsupported, for these `reasons`
    coverage      what they covered of the tiles of the launches
    simplest      the simplest failing call; None if all calls match the reference
    largest       the failing call of the same kind whose wrong tensor is largest, and shows a pattern of errors best
    caveat        the reason why `simplest` may not be the simplest, or does not fail each time
    """

    num_examples: int
    coverage: TileCoverage
    seconds: float
    reasons: frozenset[str]
    simplest: Failure | None = None
    largest: Failure | None = None
    caveat: str = ""


class DeviceLost(BaseException):
    """A kernel left the GPU unusable: whatever runs after it in this process fails too. Not for hypothesis to catch."""


def find_failure(
    op: Op,
    impl: Impl,
    config: Mapping[str, Any],
    count: int,
    seconds: float,
    seed: int = 0,
    covered: TileCoverage | None = None,
    target: str | None = None,
) -> SearchResult:
    """Check up to `count` examples of a plan (see `example_plan`) in about so many seconds; shrink the first failure.

    target: kernels run as compiled for it, in the emulator. Errors: `DeviceLost`, from the failing call.
    """
    start, num_examples = time.monotonic(), 0
    reasons: set[str] = set()
    plan = ExamplePlan(op, config, seed, covered)
    for sizes, layout in islice(plan, MAX_DRAWS * count):
        if num_examples == count or (num_examples and time.monotonic() > start + seconds):
            break
        try:
            with recorded_launches() as launches:
                failure = run_example(op, impl, config, sizes, layout, target)
        except Unsupported as reason:
            reasons.add(str(reason))
            plan.refuse(sizes)
            continue
        num_examples += 1
        plan.observe(sizes, launches)
        if failure:
            shrinker = Shrinker(op, impl, config, failure, target)
            shrinker.shrink()
            caveat, largest = shrinker.caveat(), shrinker.largest()
            took = time.monotonic() - start
            return SearchResult(
                num_examples, plan.coverage, took, frozenset(reasons), shrinker.simplest, largest, caveat
            )
    return SearchResult(num_examples, plan.coverage, time.monotonic() - start, frozenset(reasons))


class Shrinker:
    """Makes a failing example simpler: every part of it in turn, for as long as that changes something.

    A choice becomes the first of its values that still fails, a size the lowest that bisection finds. Only failures of
    the first one's kind count.
    """

    def __init__(self, op: Op, impl: Impl, config: Mapping[str, Any], first: Failure, target: str | None = None):
        self.op, self.impl, self.config, self.target = op, impl, config, target
        self.simplest, self.failures = first, [first]
        self.end = time.monotonic() + SHRINK_SECONDS

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.end

    def fails(self, sizes: Mapping[str, Any], layout: MemoryLayout) -> bool:
        """Run a simpler example; if it fails alike, it is the simplest from now on."""
        if self.out_of_time:
            return False
        failure = self.run(sizes, layout)
        self.simplest = failure or self.simplest
        return failure is not None

    def run(self, sizes: Mapping[str, Any], layout: MemoryLayout) -> Failure | None:
        with suppress(Unsupported):
            failure = run_example(self.op, self.impl, self.config, sizes, layout, self.target)
            if failure and failure.kind == self.simplest.kind:
                self.failures.append(failure)
                return failure
        return None

    def shrink(self) -> None:
        before = None
        while before is not self.simplest:
            before = self.simplest
            if self.simplest.layout != MEMORY_LAYOUTS[0]:
                self.fails(self.simplest.sizes, MEMORY_LAYOUTS[0])
            if "values" in self.simplest.sizes:
                sizes = {name: x for name, x in self.simplest.sizes.items() if name != "values"}
                self.fails(sizes, self.simplest.layout)
            if self.simplest.sizes["seed"]:
                self.fails_with("seed", 0)
            for name, axis in self.op.domain.items():
                self.lower_size(name, axis) if isinstance(axis, IntRange) else self.simplify_choice(name, axis)

    def fails_with(self, name: str, value: Any) -> bool:
        return self.fails({**self.simplest.sizes, name: value}, self.simplest.layout)

    def simplify_choice(self, name: str, axis: OneOf) -> None:
        values = [x for x in axis.values if x not in UNSUPPORTED_DTYPES]
        simpler = values[: values.index(self.simplest.sizes[name])]
        next((x for x in simpler if self.fails_with(name, x)), None)

    def lower_size(self, name: str, axis: IntRange) -> None:
        right = axis.low  # the highest size that is known not to fail
        if self.simplest.sizes[name] > right and not self.fails_with(name, right):
            while self.simplest.sizes[name] - right > axis.step and not self.out_of_time:
                middle = right + (self.simplest.sizes[name] - right) // (2 * axis.step) * axis.step
                if not self.fails_with(name, middle):
                    right = middle

    def caveat(self) -> str:
        if self.out_of_time:
            return "shrinking ran out of time; simpler cases may fail too"
        again = self.run(self.simplest.sizes, self.simplest.layout)
        return "" if again else "the same arguments do not fail each time"

    def largest(self) -> Failure:
        """The failure whose wrong tensor is largest, the simplest with every size at its upper bound included."""
        if not self.out_of_time:
            self.run(largest_sizes(self.op, self.simplest.sizes), self.simplest.layout)
        return max(self.failures, key=lambda failure: failure.num_elements)


def largest_sizes(op: Op, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The same example with every axis at its upper bound."""
    return {**sizes, **{name: axis.high for name, axis in op.domain.items() if isinstance(axis, IntRange)}}


def run_example(
    op: Op,
    impl: Impl,
    config: Mapping[str, Any],
    sizes: Mapping[str, Any],
    layout: MemoryLayout,
    target: str | None = None,
) -> Failure | None:
    """The failure of an example, or None. Errors: Unsupported, DeviceLost."""
    try:
        example = planned_example(op, sizes)
        with compiled_for(target, impl, config):
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
