"""The generic property test as a search for the simplest example on which an implementation is unfaithful."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable

from vila_triton.registry import Impl, Op, Sizes, Unsupported

from .error_budget import DEVICE, example, examples
from .guarded_memory import LAYOUTS, Layout, Unfaithful

SHRINKING = 60.0  # seconds, counted from the first failure


@dataclass(frozen=True)
class Failure:
    """A call that went wrong: its sizes, "seed" among them, how its arguments lay in memory, and what was raised."""

    sizes: Mapping[str, Any]
    layout: Layout
    error: Exception

    @property
    def kind(self) -> str:
        return self.error.kind if isinstance(self.error, Unfaithful) else "crashed"

    @property
    def elements(self) -> int:
        """Elements of the tensor that is wrong, 0 if there is none."""
        got = getattr(self.error, "got", None)
        return 0 if got is None else got.numel()


@dataclass(frozen=True)
class Verdict:
    """What a search found.

    calls        the sizes of those that were checked (none: all were unsupported, for the reasons given)
    shrunk       the simplest failing call; None: all were faithful
    largest      the failing call of the same kind whose wrong tensor is largest, in which a pattern shows best
    caveat       why `shrunk` may not be the simplest, or does not fail each time
    """

    calls: Sequence[Mapping[str, Any]]
    seconds: float
    reasons: frozenset[str]
    shrunk: Failure | None = None
    largest: Failure | None = None
    caveat: str = ""

    @property
    def examples(self) -> int:
        return len(self.calls)


class DeviceLost(BaseException):
    """A kernel left the GPU unusable: whatever runs after it in this process fails too. Not for hypothesis to catch."""


def search(op: Op, impl: Impl, config: Mapping[str, Any], count: int, seconds: float) -> Verdict:
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
    @given(sizes=examples(op), layout=st.sampled_from(LAYOUTS))
    def check(sizes: dict[str, Any], layout: Layout) -> None:
        nonlocal end
        sizes = {name: sizes[name] for name in (*op.domain, "seed")}  # while shrinking, hypothesis reorders them
        key = (*sizes.values(), layout)
        if time.monotonic() > end and checked and key not in failures:
            return  # out of time
        try:
            found = failure(op, impl, config, sizes, layout)
        except Unsupported as reason:
            reasons.add(str(reason))
            assume(False)
            return
        checked[key] = sizes
        if found:
            if not failures:
                end = time.monotonic() + SHRINKING
            failures.pop(key, None)
            failures[key] = found
            raise found.error

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
        return Verdict(list(checked.values()), time.monotonic() - start, frozenset(reasons))
    shrunk = list(failures.values())[-1]
    with suppress(Unsupported):
        if found := failure(op, impl, config, enlarged(op, shrunk.sizes), shrunk.layout):
            failures[()] = found
    largest = max((f for f in failures.values() if f.kind == shrunk.kind), key=lambda f: f.elements)
    return Verdict(list(checked.values()), time.monotonic() - start, frozenset(reasons), shrunk, largest, caveat)


def enlarged(op: Op, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The same example with every axis as long as it gets."""
    return {**sizes, **{name: axis.high for name, axis in op.domain.items() if isinstance(axis, Sizes)}}


def failure(op: Op, impl: Impl, config: Mapping[str, Any], sizes: Mapping[str, Any], layout: Layout) -> Failure | None:
    """How an example fails, if it does. Errors: `Unsupported`, `DeviceLost`."""
    try:
        held = example(op, **sizes)
        held.check(impl, config, layout, held.twice)
    except Unsupported:
        raise
    except Exception as error:  # a kernel may fail in any way at all
        if not alive():
            raise DeviceLost(str(error)) from error
        return Failure(sizes, layout, error)
    return None


def alive() -> bool:
    """Whether the GPU, if there is one, still answers."""
    try:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
