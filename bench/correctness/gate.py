"""The gate before timing: an implementation whose numbers are wrong is not timed. Used by `ops`, `tune` and `peers`."""

from collections.abc import Mapping
from functools import cache
from itertools import islice
from typing import Any

import torch

from vila_triton.registry import OPS, Impl, Unsupported

from ..measure.cases import Case, random_arguments
from .error_budget import DEVICE, SHARED_EXAMPLES, Example, copy_into
from .example_plan import ExamplePlan, planned_example
from .failure_report import exception_line
from .guarded_memory import MEMORY_LAYOUTS, MemoryLayout, map_tensors, tensors
from .tiles import recorded_launches

NUM_EXAMPLES = 14
MAX_DRAWS = 40 * NUM_EXAMPLES  # an implementation that does not support any of so many examples supports nothing
# The sizes of a case are checked themselves if the call takes at most so many flops, and its arguments so many bytes.
CASE_FLOPS = {"cpu": 10**8, "cuda": 10**12}
CASE_BYTES = {"cpu": 2**24, "cuda": 2**30}


def gate(impl: Impl, config: Mapping[str, Any], case: Case | None = None) -> str | None:
    """The reason, in one line, that the implementation may not be timed with this config; None if it may.

    It must match the reference (in guarded memory, within the error budget) on the first examples of the plan of its
    config, at the edges of its tiles and in both memory layouts, and at the sizes of the case in both layouts, unless
    they are too large for float64. Half of the examples, and the case, follow a call with other values at the same
    addresses.
    """
    reason = domain_gate(impl, tuple(sorted(config.items())))
    if reason or case is None or not fits_float64_check(case):
        return reason
    for layout in MEMORY_LAYOUTS:
        try:
            if fault := find_fault(case_example(case), impl, config, layout):
                return fault
        except Unsupported as reason:
            if layout == "aligned":  # as it is timed
                return f"unsupported: {reason}"
    return None


def case_error_gate(impl: Impl, config: Mapping[str, Any], case: Case) -> str | None:
    """The reason, in one line, that the implementation may not be timed at this case; None if it may.

    It checks only that errors are within budget, for configs that have passed `gate`. A case that is too large for
    float64 passes.
    """
    if not fits_float64_check(case):
        return None
    try:
        example = case_example(case)
        args = map_tensors(torch.clone, example.args)
        copy_into(args, example.other_values())
        stale_outputs = [x.clone() for x in tensors(impl(*args, config=config))]
        copy_into(args, example.args)
        example.check_outputs(tensors(impl(*args, config=config)), stale_outputs)
    except Unsupported as reason:
        return f"unsupported: {reason}"
    except Exception as error:  # as in `find_fault`
        return exception_line(error)
    return None


def find_fault(example: Example, impl: Impl, config: Mapping[str, Any], layout: MemoryLayout) -> str | None:
    """The fault of a call in one line, or None. Errors: Unsupported."""
    try:
        example.check(impl, config, layout, example.call_twice)
    except Unsupported:
        raise
    except Exception as error:  # a kernel may fail in any way at all; each is a reason to print no time
        return f"{exception_line(error)} (its arguments were {layout})"
    return None


def case_example(case: Case) -> Example:
    """The example with the same arguments that are timed at the case, shared by all implementations."""
    key = OPS[case.op], *case.sizes.items()
    return SHARED_EXAMPLES.get(key, lambda: Example(OPS[case.op], random_arguments(case, torch.device(DEVICE))))


def fits_float64_check(case: Case) -> bool:
    """True if the case itself is checked; otherwise only the domain is."""
    flops, size = case.cost
    return flops <= CASE_FLOPS[DEVICE] and size <= CASE_BYTES[DEVICE]


@cache
def domain_gate(impl: Impl, config: tuple[tuple[str, Any], ...]) -> str | None:
    """Returns the first fault of an implementation on examples of its op's domain, in one line, or None.

    They are the first ones of the plan of this config (see `example_plan`). Unsupported ones are skipped; if all are
    unsupported, that is the fault.
    """
    op = OPS[impl.op]
    plan = ExamplePlan(op, dict(config))
    reasons: set[str] = set()
    checked = 0
    for sizes, layout in islice(plan, MAX_DRAWS):
        try:
            with recorded_launches() as launches:
                if fault := find_fault(planned_example(op, sizes), impl, dict(config), layout):
                    return fault
        except Unsupported as reason:
            reasons.add(str(reason))
            plan.refuse(sizes)
            continue
        plan.observe(sizes, launches)
        checked += 1
        if checked == NUM_EXAMPLES:
            return None
    return None if checked else f"supports nothing here: {'; '.join(sorted(reasons))}"
