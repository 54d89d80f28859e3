"""Run a candidate in the shadow of the implementation that a model runs, and compare their results at every call.

A call is named after the weight among its arguments, by its path in the params tree; a call without one is named after
the layer whose weight was used last.
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

from .compiled_calls import compiled_for
from .error_budget import DEVICE, error_budget, error_over_budget, float64_reference
from .failure_report import exception_line
from .gate import CASE_BYTES
from .guarded_memory import bit_pattern, map_tensors, same_bits, tensors

ULP_BUCKET_ENDS = (0, 1, 3, 7, 63)  # upper ends of the buckets but the last two, which are more, and NaN
ULP_BUCKETS = ("0", "1", "2-3", "4-7", "8-63", "64+", "NaN")
BUDGET_CALLS, BUDGET_SECONDS = 20, 10.0  # a budget runs the float64 reference about so often, and may take so long


@dataclass
class LayerComparison:
    """The comparison of one layer over all its calls.

    ulps             the number of elements by their distance from the incumbent's, in units in the last place
    relative         |candidate - incumbent| / |incumbent| over all elements of the worst call
    largest          the largest difference of an element
    budget_multiple  the error of the worst element of the checked calls as a multiple of its budget; None if none was
                     checked
    unchecked        the reason why the last call that was not checked could not be
    failure          the failure of a call that gave no result to compare
    """

    calls: int = 0
    ulps: Counter[str] = field(default_factory=Counter)
    relative: float = 0.0
    largest: float = 0.0
    budget_multiple: float | None = None
    unchecked: str = ""
    failure: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.failure) or (self.budget_multiple or 0.0) > 1

    def add(self, outputs: Sequence[Tensor], result: Sequence[Tensor]) -> float:
        """Add the differences of one call, and return its relative error."""
        squared_error, squared_norm = 0.0, 0.0  # sums of squares
        for got, want in zip(outputs, result):
            self.ulps.update(ulp_histogram(got, want))
            distance = absolute_difference(got, want)
            self.largest = max(self.largest, distance.max().item() if distance.numel() else 0.0)
            squared_error += distance.square().sum().item()
            squared_norm += want.double().nan_to_num(0, 0, 0).square().sum().item()
        relative = math.sqrt(squared_error / squared_norm) if squared_norm else math.inf if squared_error else 0.0
        self.relative = max(self.relative, relative)
        return relative


class BudgetUnaffordable(Exception):
    """The error budget of a call takes too long to compute."""


@dataclass(frozen=True)
class RecordedCall:
    """A call of the candidate, with its arguments as they were before it."""

    name: str
    phase: str
    args: tuple
    config: Mapping[str, Any]
    severity: tuple[float, float]


def weight_paths(tree: Any, path: str = "") -> Iterator[tuple[int, str]]:
    """(address, path) of every tensor of a params tree; those of a linear or norm have the path of the linear or norm,
    and joined linears that of `qkv`.
    """
    if isinstance(tree, Tensor):
        yield tree.data_ptr(), path
    elif isinstance(tree, tuple):
        for i, child in enumerate(tree):
            yield from weight_paths(child, f"{path}[{i}]")
    elif is_dataclass(tree):
        for f in fields(tree):
            child_path = path if isinstance(tree, Affine | Int4) else f"{path}.{f.name}".lstrip(".")
            yield from weight_paths(getattr(tree, f.name), child_path)
        if getattr(tree, "qkv", None) is not None:
            yield from weight_paths(tree.qkv, f"{path}.qkv")  # pyright: ignore[reportAttributeAccessIssue]


class ShadowRecorder:
    """Compares the calls of one op inside `recording`; `layers` by name, in the order in which they first ran.

    target: the candidate runs as compiled for it, in the emulator.
    """

    def __init__(self, op: Op, candidate: Impl, tree: Any, name_filters: Sequence[str] = (), target: str | None = None):
        self.op, self.candidate, self.name_filters, self.target = op, candidate, name_filters, target
        self.paths = dict(weight_paths(tree))
        self.layers: dict[str, LayerComparison] = {}
        self.largest_checked: dict[str, float] = {}  # by layer, the largest relative error of a checked call
        self.worst: RecordedCall | None = None
        self.first_failure = ""  # the name of the earliest failing call
        self.phase = "prefill"
        self.last_weight_path = ""  # the path of the weight used last, by any op

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, every implementation of the op also runs the candidate; choices and results do not change."""
        discover()  # those discovered later would not be recorded
        original_impls = {name: dict(op.impls) for name, op in OPS.items()}
        for op in OPS.values():
            op.impls.update({name: self.wrap_impl(impl) for name, impl in op.impls.items()})
        try:
            yield
        finally:
            for name, impls in original_impls.items():
                OPS[name].impls.update(impls)

    def wrap_impl(self, impl: Impl) -> Impl:
        def call(*args: Any, **config: Any) -> Any:
            self.last_weight_path = self.weight_path(args) or self.last_weight_path
            if impl.op != self.op.name or (
                self.name_filters and not any(text in self.call_name(args) for text in self.name_filters)
            ):
                return impl.fn(*args, **config)
            args_before = map_tensors(torch.clone, args)
            result = impl.fn(*args, **config)
            self.compare(self.call_name(args), args_before, tensors(result), tensors(args))
            return result

        return replace(impl, fn=call)

    def weight_path(self, args: Any) -> str:
        return next((self.paths[x.data_ptr()] for x in tensors(args) if x.data_ptr() in self.paths), "")

    def call_name(self, args: Any) -> str:
        layer = re.match(r".*layers\[\d+\]", self.last_weight_path)
        return self.weight_path(args) or (layer.group() if layer else self.last_weight_path or self.op.name)

    def compare(self, name: str, args_before: tuple, result: list[Tensor], args_after: list[Tensor]) -> None:
        """Run the candidate on the same arguments, and record the differences of its results and of its arguments."""
        layer = self.layers.setdefault(name, LayerComparison())
        layer.calls += 1
        args = map_tensors(torch.clone, args_before)
        config: Mapping[str, Any] = {}
        multiple, relative, failure = 0.0, 0.0, ""
        try:
            config = self.candidate.resolve_config(*args)
            with compiled_for(self.target, self.candidate, config):
                outputs = tensors(self.candidate(*args, config=config))
        except Exception as error:  # a kernel may fail in any way at all
            outputs, failure = [], exception_line(error)
        got, expected = ([(list(x.shape), x.dtype) for x in xs] for xs in (outputs, result))
        if got == expected:
            relative = layer.add(outputs, result)
            if relative > self.largest_checked.get(name, -1.0):
                self.largest_checked[name] = relative
                multiple = self.budget_multiple(layer, args_before, outputs)
            if not all(map(same_bits, tensors(args), args_after)):
                failure = "wrote different values into its arguments than the incumbent"
        failure = failure or ("" if got == expected else f"returned {got}, expected {expected}")
        layer.failure = layer.failure or (f"{self.phase}: {failure}" if failure else "")
        severity = (math.inf, math.inf) if failure else (multiple, relative)
        if not self.first_failure and severity[0] > 1:
            self.first_failure = f"{name}, {self.phase}"
        if self.worst is None or severity > self.worst.severity:
            self.worst = RecordedCall(name, self.phase, args_before, config, severity)

    def budget_multiple(self, layer: LayerComparison, args_before: tuple, outputs: list[Tensor]) -> float:
        """The error of the worst element as a multiple of its budget; 0 if that is unknown, with the reason in
        `layer`."""
        try:
            exact, budgets = self.exact_and_budgets(args_before)
        except (BudgetUnaffordable, AssertionError) as reason:  # an assertion: the reference is not finite
            layer.unchecked = str(reason)
            return 0.0
        triples = zip(outputs, exact, budgets)
        multiple = max(
            (error_over_budget(x, want, budget).max().item() for x, want, budget in triples if x.numel()), default=0.0
        )
        layer.budget_multiple = max(layer.budget_multiple or 0.0, multiple)
        return multiple

    def exact_and_budgets(self, args: tuple) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """The exact outputs of the op, and their budgets, None if no bit may differ. Errors: BudgetUnaffordable."""
        if self.op.bitwise_exact:
            exact = tensors(self.op.reference(*map_tensors(torch.clone, args)))
            return exact, [None] * len(exact)
        if sum(x.nbytes for x in tensors(args)) > CASE_BYTES[DEVICE]:
            raise BudgetUnaffordable("the arguments are too large for float64")
        start = time.monotonic()
        float64_reference(self.op, args)
        if (time.monotonic() - start) * BUDGET_CALLS > BUDGET_SECONDS:
            raise BudgetUnaffordable("float64 takes too long")
        return error_budget(self.op, args)


def absolute_difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64: 0 where the bits agree, infinite where only one is NaN."""
    distance = (got.double() - want.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(bit_pattern(got) == bit_pattern(want), 0.0, distance)


def ulp_histogram(got: Tensor, want: Tensor) -> dict[str, int]:
    """Elements by the number of representable values from one to the other, in the buckets of `ULP_BUCKETS`."""
    integers = [bit_pattern(x).long() for x in (got, want)]
    low = -(2 ** (8 * got.element_size() - 1))
    ranks = [torch.where(x < 0, low - x, x) for x in integers]  # in the order of the numbers; 0 and -0 are the same
    ulps = (ranks[0] - ranks[1]).abs()
    is_nan = (got.isnan() | want.isnan()) & (integers[0] != integers[1])
    edges = torch.tensor(ULP_BUCKET_ENDS, device=got.device)
    bucket = torch.where(is_nan, len(ULP_BUCKETS) - 1, torch.bucketize(ulps, edges))
    counts = torch.bincount(bucket.flatten(), minlength=len(ULP_BUCKETS)).tolist()
    return dict(zip(ULP_BUCKETS, counts))
