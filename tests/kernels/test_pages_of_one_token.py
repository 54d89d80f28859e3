"""Attention over pages of one token, which the rows of a cache of transformers are: see `hf.attention_interface`.

It is no page size of the ops' domain, since no cache of ours has it.
"""

from typing import Any

import pytest

from bench.correctness.error_budget import assert_matches_reference, example_args
from vila_triton.registry import OPS, Impl, discover

discover()
SIZES: dict[str, dict[str, int]] = {
    "decode_attention": dict(b=3, t=100),
    "prefill_attention": dict(b=2, s=21, t=70),
}


@pytest.mark.parametrize(
    ("impl", "config"),
    [
        pytest.param(impl, config, id=f"{name}-{impl.name}-{i}")
        for name in SIZES
        for impl in OPS[name].impls.values()
        for i, config in enumerate(impl.configs)
    ],
)
def test_attention_over_pages_of_one_token(impl: Impl, config: dict[str, Any]) -> None:
    sizes: dict[str, Any] = dict(
        **SIZES[impl.op], g=1, ratio=3, d=64, l=1, dtype="float32", kv="plain", numerics="fast", seed=0
    )
    assert_matches_reference(OPS[impl.op], impl, config, example_args(OPS[impl.op], **sizes))
