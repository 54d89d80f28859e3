"""The gate before timing: an implementation whose numbers are wrong is not timed. Used by `ops`, `tune` and `peers`."""

import random
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

import torch

from vila_triton.registry import OPS, Impl, IntRange, Op, Unsupported

from ..measure.cases import Case, random_arguments
from .error_budget import DEVICE, SHARED_EXAMPLES, UNSUPPORTED_DTYPES, Example, copy_into, shared_example
from .failure_report import exception_line
from .guarded_memory import MEMORY_LAYOUTS, MemoryLayout, map_tensors, tensors

NUM_EXAMPLES = 12
MAX_DRAWS = 10 * NUM_EXAMPLES  # an implementation that does not support any of so many examples supports nothing
# The sizes of a case are checked themselves if the call takes at most so many flops, and its arguments so many bytes.
CASE_FLOPS = {"cpu": 10**8, "cuda": 10**12}
CASE_BYTES = {"cpu": 2**24, "cuda": 2**30}


def gate(impl: Impl, config: Mapping[str, Any], case: Case | None = None) -> str | None:
    """The reason, in one line, that the implementation may not be timed with this config; None if it may.

    It must match the reference (in guarded memory, within the error budget) on random examples of the op's whole
    domain, the same each time and alternating between both memory layouts, and at the sizes of the case in both
    layouts, unless they are too large for float64. Half of the examples, and the case, follow a call with other values
    at the same addresses.
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


def random_sizes(op: Op) -> Iterator[dict[str, Any]]:
    """Endless random sizes of the domain, the same each time: the smallest first, and the ends of an axis often."""
    rng = random.Random(op.name)
    yield {**{n: d.low if isinstance(d, IntRange) else d.values[0] for n, d in op.domain.items()}, "seed": 0}
    while True:
        sizes = {}
        for name, domain in op.domain.items():
            if isinstance(domain, IntRange):
                values = range(domain.low, domain.high + 1, domain.step)
                sizes[name] = rng.choice((values[0], values[-1], rng.choice(values)))
            else:
                sizes[name] = rng.choice([value for value in domain.values if value not in UNSUPPORTED_DTYPES])
        yield {**sizes, "seed": rng.randrange(2**16)}


@cache
def domain_gate(impl: Impl, config: tuple[tuple[str, Any], ...]) -> str | None:
    """Returns the first fault of an implementation on random examples of its op's domain, in one line, or None.

    The examples are the same each time, and their memory layouts alternate. Unsupported ones are skipped; if all
    are unsupported, that is the fault.
    """
    op = OPS[impl.op]
    reasons: set[str] = set()
    checked = 0
    for i, sizes in enumerate(islice(random_sizes(op), MAX_DRAWS)):
        try:
            if fault := find_fault(
                shared_example(op, **sizes), impl, dict(config), MEMORY_LAYOUTS[i % len(MEMORY_LAYOUTS)]
            ):
                return fault
        except Unsupported as reason:
            reasons.add(str(reason))
            continue
        checked += 1
        if checked == NUM_EXAMPLES:
            return None
    return None if checked else f"supports nothing here: {'; '.join(sorted(reasons))}"
