"""Attention with `return_lse`: output and log-sum-exp of every implementation are within their budget."""

import pytest

from bench.correctness.error_budget import assert_matches_reference, example_args
from vila_triton import ops
from vila_triton.registry import Op, discover

discover()
SIZES = {
    "encoder_attention": {"b": 2, "s": 20, "h": 1, "d": 24},
    "prefill_attention": {"b": 2, "s": 5, "t": 20, "g": 1, "ratio": 3, "d": 24, "l": 16, "kv": "plain"},
}
CASES = [(op, name) for op in map(ops.__dict__.get, SIZES) if op for name in op.impls if name != "reference"]


@pytest.mark.on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of interpreted kernels on hard values
@pytest.mark.parametrize("op, name", CASES, ids=[f"{op.name}-{name}" for op, name in CASES])
def test_log_sum_exp_is_within_its_budget(op: Op, name: str) -> None:
    flags = (True,) if op is ops.encoder_attention else ("fast", True)
    for dtype, values in (("float16", "random"), ("float32", "rising_scores"), ("float32", "negative_scores")):
        args = example_args(op, 0, **SIZES[op.name], dtype=dtype, values=values)
        assert_matches_reference(op, op.impls[name], op.impls[name].configs[0], (*args, *flags))
