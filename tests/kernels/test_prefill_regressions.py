"""Bugs of other projects' attention kernels, tested of prefill and of the towers' attention: one test for each report.

Offsets beyond 2³¹ are reached by strided views of memory that is mostly never touched; those of all arguments, alone,
in `test_offsets_beyond_32_bits`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from far_memory import FarMemory

from bench.correctness.error_budget import DEVICE, assert_matches_reference, example_args
from bench.correctness.guarded_memory import bit_pattern
from vila_triton.ops import RaggedBatch, encoder_attention, prefill_attention
from vila_triton.registry import REFERENCE, Impl, Op, discover

discover()
SIZES: dict[str, Any] = dict(
    b=1, s=5, t=20, g=1, ratio=3, d=24, l=16, dtype="float32", kv="plain", numerics="fast", seed=2
)


def each(*ops: Op) -> pytest.MarkDecorator:
    """Every implementation but the reference of each op, with its first config."""
    pairs = [(op, impl) for op in ops for impl in op.impls.values() if impl.name != REFERENCE]
    return pytest.mark.parametrize("op, impl", [pytest.param(*x, id=f"{x[0].name}-{x[1].name}") for x in pairs])


def faithful(impl: Impl, change: Callable[[tuple], tuple] = lambda args: args, **sizes: Any) -> None:
    args = example_args(prefill_attention, **{**SIZES, **sizes})
    try:
        assert_matches_reference(prefill_attention, impl, impl.configs[0], change(args))
    except ValueError as reason:
        pytest.skip(str(reason))


@pytest.mark.on_gpu
@each(prefill_attention)
def test_prefill_reaches_packed_tokens_beyond_32_bits(op: Op, impl: Impl, far: FarMemory) -> None:
    """An int32 query_start_loc times a stride; q, k and v as views of one product.

    https://github.com/sgl-project/sglang/issues/20389 https://github.com/thu-ml/SageAttention/issues/386
    https://github.com/pytorch/pytorch/issues/190857
    """
    q, k, v, *rest = example_args(op, **{**SIZES, "dtype": "float16", "b": 2})
    views = far.apart(torch.cat((q, k, v), 1)).split([3, 1, 1], 1)
    config = impl.configs[0]
    assert torch.equal(
        bit_pattern(impl(*views, *rest, config=config)), bit_pattern(impl(q, k, v, *rest, config=config))
    )


@pytest.mark.on_gpu
@each(encoder_attention)
def test_encoder_reaches_packed_images_beyond_32_bits(op: Op, impl: Impl, far: FarMemory) -> None:
    """https://github.com/thu-ml/SageAttention/issues/386"""
    q, k, v, scale = example_args(op, b=2, s=9, h=2, d=24, dtype="float16", seed=0)
    views = far.apart(torch.stack((q, k, v), 2)).unbind(2)
    config = impl.configs[0]
    assert torch.equal(
        bit_pattern(impl(*views, scale, config=config)), bit_pattern(impl(q, k, v, scale, config=config))
    )


@each(prefill_attention)
@pytest.mark.parametrize("t", [1, 15, 17])
def test_nan_beyond_the_context_is_ignored(op: Op, impl: Impl, t: int) -> None:
    """A weight of 0 times NaN is NaN: https://github.com/vllm-project/vllm/pull/47305"""
    faithful(impl, t=t)


@pytest.mark.on_gpu
@each(prefill_attention)
def test_padding_rows_do_not_change_other_rows(op: Op, impl: Impl) -> None:
    """NaN out of padding: https://github.com/Dao-AILab/flash-attention/issues/1745"""
    faithful(impl, b=3, s=7, t=40)


@pytest.mark.on_gpu
@each(prefill_attention)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_beyond_the_range_of_exp_do_not_overflow(op: Op, impl: Impl, dtype: str) -> None:
    """exp(88) overflows: https://github.com/vllm-project/vllm/issues/56578"""
    faithful(impl, lambda args: (600 * args[0], *args[1:]), dtype=dtype)


@each(prefill_attention)
@pytest.mark.parametrize("new, old", [((0, 3, 0), (4, 0, 0)), ((0, 0), (0, 17)), ((2, 0), (0, 0))])
def test_sequences_without_new_or_cached_tokens_match_the_reference(
    op: Op, impl: Impl, new: tuple[int, ...], old: tuple[int, ...]
) -> None:
    """Empty splits and rows: https://github.com/LMCache/LMCache/pull/3092 https://github.com/sgl-project/sglang/pull/38142"""

    def cut(args: tuple) -> tuple:
        q, k, v, cache, _, scale = args
        start = torch.tensor([0, *new]).cumsum(0).int().to(DEVICE)
        cache = replace(cache, block_table=cache.block_table.expand(len(new), -1).contiguous())
        rows = slice(sum(new))
        return q[rows], k[rows], v[rows], cache, RaggedBatch(start, torch.tensor(old).int().to(DEVICE)), scale

    if sum(new):
        faithful(impl, cut)
    else:
        args = cut(example_args(op, **SIZES))
        assert impl(*args, config=impl.configs[0]).shape == (0, 3, SIZES["d"])


@each(prefill_attention)
@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("t", [1, 17])
def test_scales_beyond_the_context_are_ignored(op: Op, impl: Impl, kv: str, t: int) -> None:
    """They are NaN: https://github.com/vllm-project/vllm/issues/47303"""
    faithful(impl, kv=kv, t=t)


@each(prefill_attention)
@pytest.mark.parametrize("t", [0, 1])
def test_a_single_token_matches_the_reference(op: Op, impl: Impl, t: int) -> None:
    """https://github.com/triton-lang/kernels/issues/6"""
    faithful(impl, s=1, t=t)


@each(prefill_attention)
@pytest.mark.parametrize("l", [1, 8, 20])
def test_small_and_odd_page_sizes_match_the_reference(op: Op, impl: Impl, l: int) -> None:
    """https://github.com/vllm-project/vllm/issues/41339"""
    faithful(impl, l=l, t=41)


@each(prefill_attention)
@pytest.mark.parametrize("l", [64, 256])
def test_a_context_shorter_than_a_page_matches_the_reference(op: Op, impl: Impl, l: int) -> None:
    """https://github.com/flashinfer-ai/flashinfer/issues/725"""
    faithful(impl, l=l, t=3)
