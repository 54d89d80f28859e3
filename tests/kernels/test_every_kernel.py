"""Every implementation of every op, with every config, against the op's reference. The registry is the only list.

`pytest -k "int4_matmul and mine"` runs one variant, `HYPOTHESIS_PROFILE=thorough` hundreds of cases of each.
"""

import math

import pytest
import torch
from hypothesis import given, settings

from bench.correctness.error_budget import (
    DEVICE,
    UNSUPPORTED_DTYPES,
    assert_matches_reference,
    error_budget,
    example_args,
    example_strategy,
    unit_roundoff,
)
from bench.correctness.failure_report import format_settings
from bench.correctness.find_failure import find_failure
from bench.correctness.guarded_memory import map_tensors, tensors
from vila_triton.registry import OPS, REFERENCE, Impl, OneOf, Op, Unsupported, count_calls, discover

discover()
EXAMPLES_PER_CASE = 2  # of a hypothesis profile
CASES: list = [
    pytest.param(op, impl, config, id=f"{op.name}-{impl.name}-{i}")
    for op in OPS.values()
    for impl in op.impls.values()
    if impl.name != REFERENCE
    for i, config in enumerate(impl.configs)
]


EACH_OP = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.mark.on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of interpreted kernels on hard values
@pytest.mark.parametrize("op, impl, config", CASES)
def test_faithful(op: Op, impl: Impl, config: dict) -> None:
    """At the first examples of its plan, which are at the edges of its tiles, in both memory layouts."""
    result = find_failure(op, impl, config, EXAMPLES_PER_CASE * settings().max_examples, math.inf)
    if not result.num_examples:
        pytest.skip(f"supports nothing here: {'; '.join(sorted(result.reasons))}")
    if failure := result.simplest:
        raise AssertionError(f"{format_settings(failure.sizes)}, {failure.layout}: {failure.error}") from failure.error


@EACH_OP
def test_references_are_faithful(op: Op) -> None:
    """They read and write what they should, and two runs of them agree: the harness raises no false alarm."""

    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        assert_matches_reference(op, op.impls[REFERENCE], {}, example_args(op, **sizes), sizes["seed"])

    check()


@EACH_OP
def test_wrong_shapes_stop_at_the_op(op: Op) -> None:
    """One axis too many in any tensor is a ValueError before any implementation runs."""
    sizes = {n: d.values[0] if isinstance(d, OneOf) else min(d.high, max(d.low, 2)) for n, d in op.domain.items()}
    args = example_args(op, seed=0, **sizes)
    for wrong in range(len(tensors(args))):
        left = iter(range(len(tensors(args))))
        bad = map_tensors(lambda x, left=left, wrong=wrong: x[..., None] if next(left) == wrong else x, args)
        with count_calls() as ran, pytest.raises(ValueError, match=op.name):
            op(*bad)
        assert not ran


@pytest.mark.parametrize("op, impl, config", CASES)
def test_float64_is_faithful_or_unsupported(op: Op, impl: Impl, config: dict) -> None:
    """A launcher says what it cannot do before it launches. One that takes float64 computes in it: its error is the
    budget of float32, as much smaller as float64 rounds finer, twice since the exact values are rounded to it as well.
    """
    sizes = {n: d.values[0] if isinstance(d, OneOf) else d.high for n, d in op.domain.items()}
    args = example_args(op, seed=0, **sizes)
    try:
        outputs = tensors(
            impl(*map_tensors(lambda x: x.double() if x.is_floating_point() else x.clone(), args), config=config)
        )
    except Unsupported as reason:
        assert "float64" in str(reason)
        return
    finer = unit_roundoff(torch.float64) / unit_roundoff(torch.float32)
    for out, want, allowed in zip(outputs, *error_budget(op, args)):
        assert out.dtype == torch.float64 and ((out - want).abs() <= 2 * finer * allowed).all()


@pytest.mark.skipif(not UNSUPPORTED_DTYPES, reason="kernels are compiled here, not interpreted")
def test_interpreted_bfloat16_is_unsupported() -> None:
    """Its numbers would be wrong by powers of ten, see https://github.com/triton-lang/triton/issues/4972."""
    x = torch.ones(2, 8, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(Unsupported, match="bfloat16"):
        OPS["swiglu"].impls["triton"](x, x)


def test_a_linear_of_two_dtypes_is_unsupported() -> None:
    """Interpreted it would be worked out in one of them."""
    x = torch.ones(2, 32, dtype=torch.float16, device=DEVICE)
    with pytest.raises(Unsupported, match=r"linear: w is torch\.float32, expected torch\.float16 like x"):
        OPS["linear"].impls["triton"](x, x.float())
