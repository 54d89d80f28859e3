"""The hard cases of ops: what each is named for is in its arguments, and the reference itself is right for it."""

import pytest

from bench.correctness.error_budget import assert_matches_reference, example_args, shape_and_dtype
from bench.correctness.guarded_memory import same_bits, tensors
from vila_triton.registry import OPS, REFERENCE, IntRange, Op, discover

discover()
CASES = pytest.mark.parametrize(
    "op, name", [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS.values() for name in op.hard_cases]
)


def sizes_of(op: Op, at: str) -> dict:
    """The sizes at one end of the domain, "low" or "high", in float16."""
    ends = {n: getattr(d, at) if isinstance(d, IntRange) else d.values[0] for n, d in op.domain.items()}
    return {**ends, "dtype": "float16"}


@pytest.mark.on_gpu
@pytest.mark.parametrize("at", ["low", "high"])
@CASES
def test_the_reference_is_right_for_arguments_of_the_same_shapes(op: Op, name: str, at: str) -> None:
    sizes = sizes_of(op, at)
    random, args = example_args(op, 0, **sizes), example_args(op, 0, **sizes, values=name)
    assert list(map(shape_and_dtype, tensors(args))) == list(map(shape_and_dtype, tensors(random)))
    assert at == "low" or not all(map(same_bits, tensors(args), tensors(random)))
    assert_matches_reference(op, op.impls[REFERENCE], {}, args)


def test_a_name_is_registered_once() -> None:
    op = Op(lambda x: x, bitwise_exact=False)
    op.hard_case("zeros")(lambda args, rng: args)
    for name in ("zeros", "random"):
        with pytest.raises(ValueError, match=f"already are example arguments that are called '{name}'"):
            op.hard_case(name)(lambda args, rng: args)
    with pytest.raises(KeyError):
        example_args(OPS["rms_norm"], 0, **sizes_of(OPS["rms_norm"], "low"), values="unknown")
