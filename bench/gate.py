"""The gate: an implementation whose numbers are wrong gets no time. `ops`, `tune` and the peers all pass through it."""

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any
from unittest import SkipTest

from hypothesis import HealthCheck, Phase, given, settings

from vila_triton.registry import OPS, Impl, Op, Unsupported

from .cases import Case
from .failure import crash
from .faithful import DEVICE, arguments, assert_faithful, budget, examples, hold, supported, within_budget
from .guarded import tensors

EXAMPLES = 12
# A case is checked itself where float64 takes no longer than this many flops, and its arguments no more bytes.
CASE_FLOPS = {"cpu": 10**8, "cuda": 10**12}
CASE_BYTES = {"cpu": 2**24, "cuda": 2**30}


def gate(impl: Impl, config: Mapping[str, Any], case: Case | None = None) -> str | None:
    """Why the implementation with this config may not be timed, in one line; None if it may.

    It must be faithful (guarded memory, computed budget) on random examples of the op's whole domain, the same each
    time, and at the sizes of the case if those are not too large for float64.
    """
    reason = domain_gate(impl, tuple(sorted(config.items())))
    if reason or case is None or not affordable(case):
        return reason
    return case_gate(OPS[impl.op], impl, config, case)


def numbers_gate(impl: Impl, config: Mapping[str, Any], case: Case) -> str | None:
    """Why the implementation may not be timed at this case, in one line: its numbers are beyond budget there. Nothing
    else is looked at: for configs that have passed `gate`. What is too large for float64 passes.
    """
    if not affordable(case):
        return None
    try:
        args, exact, allowed = expected(case.op, tuple(case.sizes.items()))
        for i, (out, want, room) in enumerate(zip(tensors(impl(*args, config=config)), exact, allowed, strict=True)):
            within_budget(i, out, want, room)
    except Unsupported as reason:
        return f"unsupported: {reason}"
    except Exception as error:  # as in `domain_gate`
        return crash(error)
    return None


@lru_cache(maxsize=1)
def expected(op: str, sizes: tuple[tuple[str, Any], ...]) -> tuple[Any, Any, Any]:
    """Arguments, exact outputs and budgets, made once for all implementations at the same sizes."""
    args = arguments(OPS[op], seed=0, **dict(sizes))
    return args, *budget(OPS[op], args)


def affordable(case: Case) -> bool:
    """Whether the case itself is checked, or the domain only."""
    flops, size = case.cost
    return flops <= CASE_FLOPS[DEVICE] and size <= CASE_BYTES[DEVICE]


@cache
def domain_gate(impl: Impl, config: tuple[tuple[str, Any], ...]) -> str | None:
    op = OPS[impl.op]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(sizes=examples(op))
    def check(sizes: dict) -> None:
        supported(assert_faithful, op, impl, dict(config), arguments(op, **sizes), sizes["seed"])

    try:
        hold(check)
    except SkipTest as reason:
        return str(reason)
    except Exception as error:  # a kernel may fail in any way at all; each is a reason to print no time
        return crash(error)
    return None


def case_gate(op: Op, impl: Impl, config: Mapping[str, Any], case: Case) -> str | None:
    try:
        args = arguments(op, seed=0, **case.sizes)
        if tensors(args):
            assert_faithful(op, impl, config, args)
    except Unsupported as reason:
        return f"unsupported: {reason}"
    except Exception as error:
        return crash(error)
    return None
