"""A candidate beside the implementation that a model runs: at every call both, and how far their results lie apart.

Calls are named after the weight among their arguments, by its path in the params tree; a call without one after the
layer whose weight was used last.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vila_triton.models.layers import Affine
from vila_triton.ops import Int4
from vila_triton.registry import OPS, Impl, Op, discover

from .error_budget import DEVICE, budget, exactly, excess
from .failure_report import crash
from .gate import CASE_BYTES
from .guarded_memory import bits, mapped, tensors

MOST_ULPS = (0, 1, 3, 7, 63)  # the last of each bucket of the histogram but the last two: more, and NaN
BUCKETS = ("0", "1", "2-3", "4-7", "8-63", "64+", "NaN")
BUDGET_CALLS, BUDGET_SECONDS = 20, 10.0  # a budget takes about so many references in float64, and may take so long


@dataclass
class Line:
    """What was seen of one layer over all its calls.

    ulps       how many elements lie how many steps of their dtype from the incumbent's, by bucket
    relative   the worst call's |candidate - incumbent| / |incumbent|, over all elements
    largest    the largest difference of an element
    times      the worst element of the calls that were checked, in times its budget; None if none could be checked
    unchecked  why, the last time that one could not
    failure    what went wrong with a call that gave no result to compare
    """

    calls: int = 0
    ulps: Counter[str] = field(default_factory=Counter)
    relative: float = 0.0
    largest: float = 0.0
    times: float | None = None
    unchecked: str = ""
    failure: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.failure) or (self.times or 0.0) > 1

    def add(self, outputs: Sequence[Tensor], result: Sequence[Tensor]) -> float:
        """Count the differences of one call; its relative error."""
        off, size = 0.0, 0.0  # sums of squares
        for got, want in zip(outputs, result):
            self.ulps.update(histogram(got, want))
            apart = difference(got, want)
            self.largest = max(self.largest, apart.max().item() if apart.numel() else 0.0)
            off += apart.square().sum().item()
            size += want.double().nan_to_num(0, 0, 0).square().sum().item()
        relative = math.sqrt(off / size) if size else math.inf if off else 0.0
        self.relative = max(self.relative, relative)
        return relative


class TooMuch(Exception):
    """A budget is not affordable, for the reason given."""


@dataclass(frozen=True)
class Call:
    """The worst call so far, with its arguments as they were before it."""

    name: str
    phase: str
    args: tuple
    config: Mapping[str, Any]
    badness: tuple[float, float]


def weight_paths(tree: Any, path: str = "") -> Iterator[tuple[int, str]]:
    """(address, path) of every leaf of a params tree; what a linear map or norm holds goes by the name of that."""
    if isinstance(tree, Tensor):
        yield tree.data_ptr(), path
    elif isinstance(tree, tuple):
        for i, part in enumerate(tree):
            yield from weight_paths(part, f"{path}[{i}]")
    elif is_dataclass(tree):
        for f in fields(tree):
            below = path if isinstance(tree, Affine | Int4) else f"{path}.{f.name}".lstrip(".")
            yield from weight_paths(getattr(tree, f.name), below)


class Beside:
    """Watches the calls of one op inside `watching`; `lines` by the name of the layer, in the order they first ran."""

    def __init__(self, op: Op, candidate: Impl, tree: Any, only: Sequence[str] = ()):
        self.op, self.candidate, self.only = op, candidate, only
        self.paths = dict(weight_paths(tree))
        self.lines: dict[str, Line] = {}
        self.checked: dict[str, float] = {}  # of each layer the largest relative error of a call that was checked
        self.worst: Call | None = None
        self.first = ""  # the first call, in time, that was wrong
        self.phase = "prefill"
        self.place = ""  # the path of the weight used last, by any op

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every implementation of the op runs the candidate too; choices and results stay as they are."""
        discover()  # what is found later would go unwatched
        before = {name: dict(op.impls) for name, op in OPS.items()}
        for op in OPS.values():
            op.impls.update({name: self.watched(impl) for name, impl in op.impls.items()})
        try:
            yield
        finally:
            for name, impls in before.items():
                OPS[name].impls.update(impls)

    def watched(self, impl: Impl) -> Impl:
        def call(*args: Any, **config: Any) -> Any:
            self.place = self.weight(args) or self.place
            if impl.op != self.op.name or (self.only and not any(text in self.name(args) for text in self.only)):
                return impl.fn(*args, **config)
            before = mapped(torch.clone, args)
            result = impl.fn(*args, **config)
            self.compare(self.name(args), before, tensors(result), tensors(args))
            return result

        return replace(impl, fn=call)

    def weight(self, args: Any) -> str:
        return next((self.paths[x.data_ptr()] for x in tensors(args) if x.data_ptr() in self.paths), "")

    def name(self, args: Any) -> str:
        layer = re.match(r".*layers\[\d+\]", self.place)
        return self.weight(args) or (layer.group() if layer else self.place or self.op.name)

    def compare(self, name: str, before: tuple, result: list[Tensor], after: list[Tensor]) -> None:
        """Run the candidate on the arguments as they were, and keep how its results and arguments differ."""
        line = self.lines.setdefault(name, Line())
        line.calls += 1
        args = mapped(torch.clone, before)
        config: Mapping[str, Any] = {}
        times, relative, failure = 0.0, 0.0, ""
        try:
            config = self.candidate.chosen(*args)
            outputs = tensors(self.candidate(*args, config=config))
        except Exception as error:  # a kernel may fail in any way at all
            outputs, failure = [], crash(error)
        got, expected = ([(list(x.shape), x.dtype) for x in xs] for xs in (outputs, result))
        if got == expected:
            relative = line.add(outputs, result)
            if relative > self.checked.get(name, -1.0):
                self.checked[name] = relative
                times = self.times_budget(line, before, outputs)
            if any(not torch.equal(bits(x), bits(y)) for x, y in zip(tensors(args), after)):
                failure = "leaves its arguments otherwise"
        failure = failure or ("" if got == expected else f"returned {got}, expected {expected}")
        line.failure = line.failure or (f"{self.phase}: {failure}" if failure else "")
        badness = (math.inf, math.inf) if failure else (times, relative)
        if not self.first and badness[0] > 1:
            self.first = f"{name}, {self.phase}"
        if self.worst is None or badness > self.worst.badness:
            self.worst = Call(name, self.phase, before, config, badness)

    def times_budget(self, line: Line, before: tuple, outputs: list[Tensor]) -> float:
        """How many times its budget the worst element is off; 0 if that is not known, and the line says why."""
        try:
            exact, allowed = self.bounds(before)
        except (TooMuch, AssertionError) as reason:  # an assertion: the reference is not finite
            line.unchecked = str(reason)
            return 0.0
        each = zip(outputs, exact, allowed)
        times = max((excess(x, want, room).max().item() for x, want, room in each if x.numel()), default=0.0)
        line.times = max(line.times or 0.0, times)
        return times

    def bounds(self, args: tuple) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """What the op should return for these arguments, and the budget (None: not a bit may differ)."""
        if self.op.exact:
            wants = tensors(self.op.reference(*mapped(torch.clone, args)))
            return wants, [None] * len(wants)
        if sum(x.nbytes for x in tensors(args)) > CASE_BYTES[DEVICE]:
            raise TooMuch("the arguments are too large for float64")
        start = time.monotonic()
        exactly(self.op, args)
        if (time.monotonic() - start) * BUDGET_CALLS > BUDGET_SECONDS:
            raise TooMuch("float64 takes too long")
        return budget(self.op, args)


def difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64: 0 where the bits agree, infinite where only one is NaN."""
    off = (got.double() - want.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(bits(got) == bits(want), 0.0, off)


def histogram(got: Tensor, want: Tensor) -> dict[str, int]:
    """Elements by the number of representable values from one to the other, in the buckets of `BUCKETS`."""
    whole = [bits(x).long() for x in (got, want)]
    low = -(2 ** (8 * got.element_size() - 1))
    ranks = [torch.where(x < 0, low - x, x) for x in whole]  # in the order of the numbers; 0 and -0 are the same
    ulps = (ranks[0] - ranks[1]).abs()
    lost = (got.isnan() | want.isnan()) & (whole[0] != whole[1])
    edges = torch.tensor(MOST_ULPS, device=got.device)
    bucket = torch.where(lost, len(BUCKETS) - 1, torch.bucketize(ulps, edges))
    counts = torch.bincount(bucket.flatten(), minlength=len(BUCKETS)).tolist()
    return dict(zip(BUCKETS, counts))
