"""KV pages: the error of quantizing them, the bytes that writing touches, and faults other cache kernels have had."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from far_memory import FarMemory
from hypothesis import given
from hypothesis import strategies as st

from bench.correctness.error_budget import (
    DEVICE,
    assert_matches_reference,
    example_args,
    float64_reference,
    unit_roundoff,
)
from bench.correctness.guarded_memory import MismatchError, bit_pattern, map_tensors, tensors
from vila_triton import ops
from vila_triton.ops.kv_pages import quantize_kv
from vila_triton.registry import Impl, Unsupported, discover

discover()
_split = import_module("vila_triton.kernels._split_kv")  # pyright sees no module behind that door
NAMES = ("INVARIANT_SPLIT", "MIN_SPLIT", "MAX_SPLIT", "plan_splits", "estimated_time")
INVARIANT_SPLIT, MIN_SPLIT, MAX_SPLIT, plan_splits, estimated_time = (getattr(_split, name) for name in NAMES)
PROGRAMS = 264  # at a time: two on each multiprocessor of an H100
KINDS = pytest.mark.parametrize("kv", ["plain", "int8", "int4"])
DECODE: dict[str, Any] = dict(b=2, t=90, g=2, ratio=2, d=32, l=16, dtype="float16", kv="plain", numerics="fast", seed=3)
TRITON = ops.decode_attention.impls["triton"]


@given(
    kv=st.sampled_from(["int8", "int4"]),
    scales=st.sampled_from([torch.float32, torch.float16]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from([2, 6, 32, 72])),
    shift=st.floats(-4, 4),
    size=st.floats(-12, 12),
    seed=st.integers(0, 2**16),
)
def test_quantized_values_are_within_half_a_scale(
    kv: str, scales: torch.dtype, shape: tuple, shift: float, size: float, seed: int
) -> None:
    """And at the ends of the range as many roundings of the scale more as there are codes."""
    x = ((torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift) * 2**size).to(DEVICE)
    held = quantize_kv(x, ops.empty_kv_pages((0, shape[-1]), kv, DEVICE, scale_dtype=scales))
    assert isinstance(held, ops.QuantizedKVPages)
    step = held.scales.double()[..., None]
    exact = held.map(lambda y: y.double() if y.is_floating_point() else y).dequantize()
    codes = 127 if kv == "int8" else 15
    off = (exact - x.double()).abs() / step
    assert (
        held.shape == x.shape
        and (off <= 0.5 + codes * (unit_roundoff(scales) + 2 * unit_roundoff(torch.float32))).all()
    )
    span = x.abs().amax(-1) if kv == "int8" else x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)
    least = torch.finfo(scales).smallest_normal
    assert (step[..., 0] <= (span.double() / codes * (1 + 2 * unit_roundoff(scales))).clamp(min=least)).all()


@KINDS
def test_zeros_are_quantized_to_zeros(kv: str) -> None:
    like = ops.empty_kv_pages((0, 8), torch.float16 if kv == "plain" else kv, DEVICE)
    held = quantize_kv(torch.zeros(3, 2, 8, device=DEVICE), like)
    assert not (held if isinstance(held, torch.Tensor) else held.dequantize()).any()


def test_inconsistent_pages_are_refused_by_the_op() -> None:
    k, v, k_pages, v_pages, slots = example_args(ops.kv_write, 0, s=3, g=2, d=8, l=16, dtype="float16", kv="int4")
    eight = example_args(ops.kv_write, 0, s=3, g=2, d=8, l=16, dtype="float16", kv="int8")[2]
    wrong = {
        "v_pages is int4 with scales in torch.float32, expected int8": (eight, v_pages),
        "k_pages.values is torch.int8, expected torch.uint8 in 4 bits": (
            ops.QuantizedKVPages(k_pages.values.to(torch.int8), k_pages.scales, k_pages.zeros),
            v_pages,
        ),
        "scales and zeros of k_pages are torch.float32 and torch.float16": (
            ops.QuantizedKVPages(k_pages.values, k_pages.scales, k_pages.zeros.half()),
            v_pages,
        ),
        r"k_pages.scales has shape": (
            ops.QuantizedKVPages(k_pages.values, k_pages.scales[1:], k_pages.zeros),
            v_pages,
        ),
        "k_pages has shape": (ops.QuantizedKVPages(k_pages.values[..., 1:], k_pages.scales, k_pages.zeros), v_pages),
    }
    for message, (k_wrong, v_wrong) in wrong.items():
        with pytest.raises(ValueError, match=f"kv_write: {message}"):
            ops.kv_write(k, v, k_wrong, v_wrong, slots)
    with pytest.raises(ValueError, match="no pages in 'int3'; there are: int8, int4"):
        ops.empty_kv_pages((1, 16, 2, 8), "int3")
    with pytest.raises(ValueError, match="even head dim, got 7"):
        ops.empty_kv_pages((1, 16, 2, 7), "int4")
    args = example_args(ops.decode_attention, **DECODE)
    with pytest.raises(ValueError, match="decode_attention: no numerics 'exact'; there are: fast, batch_invariant"):
        ops.decode_attention(*args, numerics="exact")
    with pytest.raises(Unsupported, match="log-sum-exp"):
        ops.decode_attention.impls["simple"](*args, return_lse=True)


@pytest.mark.on_gpu
@pytest.mark.parametrize("name", ["kv_write", "rope_kv_write"])
@KINDS
def test_kv_write_skips_negative_slots_and_reaches_pages_beyond_32_bits(name: str, kv: str, far: FarMemory) -> None:
    """vllm 47671: a page number times a stride, in 32 bits. By a strided view of memory that is mostly never touched:
    the last page of a pool begins more than 2³¹ elements from the first."""
    op = ops.kv_write if name == "kv_write" else ops.rope_kv_write
    sizes = dict(s=20, g=2, d=16, l=16, dtype="float16", kv=kv) | ({"ratio": 2} if op is ops.rope_kv_write else {})
    args = list(example_args(op, 0, **sizes))
    args[-1][::3] = -1
    pools = narrow(tuple(args[-3:-1]))
    args[-3:-1] = pools
    there = [*args[:-3], *map_tensors(far.apart, pools), args[-1]]
    impl = op.impls["triton"]
    for got, want in zip(
        tensors(impl(*there, config=impl.configs[0])), tensors(op.reference(*map_tensors(torch.clone, args)))
    ):
        assert torch.equal(bit_pattern(got), bit_pattern(want))


def narrow(pools: Any) -> Any:
    """The pools with scales and zeros of two bytes each, as `far` has room for on a GPU."""
    return map_tensors(lambda x: x.half() if x.is_floating_point() else x, pools)


@pytest.mark.on_gpu
@KINDS
def test_decode_reaches_pages_and_scales_beyond_32_bits(kv: str, far: FarMemory) -> None:
    """vllm 47671, 50427; vllm 49716: strides of scales of their own."""
    q, cache, *rest = example_args(ops.decode_attention, **{**DECODE, "kv": kv})
    cache = narrow(cache)
    near = TRITON(q, cache, *rest, config=TRITON.configs[0])
    there = TRITON(q, replace(cache, k_pages=map_tensors(far.apart, cache.k_pages)), *rest, config=TRITON.configs[0])
    assert torch.equal(bit_pattern(near), bit_pattern(there))


@pytest.mark.on_gpu
def test_decode_reaches_queries_beyond_32_bits(far: FarMemory) -> None:
    """sglang 20389, SageAttention 386: an index of a query times its stride, of views that are not contiguous."""
    q, *rest = example_args(ops.decode_attention, **{**DECODE, "b": 3})
    near, there = (TRITON(x, *rest, config=TRITON.configs[0]) for x in (q, far.apart(q)))
    assert torch.equal(bit_pattern(near), bit_pattern(there))


@pytest.mark.on_gpu
@KINDS
def test_decode_ignores_nan_beyond_the_sequence_length(kv: str) -> None:
    """vllm 47305, flash-attention 1745, flashinfer 725: 0 · NaN beyond the length, in tails of pages, pages of nobody,
    and (vllm 47303) scales and zeros there; lengths below a page, and 11 (triton-lang/kernels 6) of 1."""
    for t in (1, 2, 15, 16, 17, 63, 64, 65):
        args = example_args(ops.decode_attention, **{**DECODE, "kv": kv, "t": t, "b": 1, "g": 1})
        unread = [int(x.isnan().sum()) for x in tensors(args[1]) if x.is_floating_point()]
        assert all(unread)
        out = TRITON(*args, "fast", True, config=TRITON.configs[1])
        assert all(torch.isfinite(x).all() for x in out)


@pytest.mark.on_gpu
@KINDS
def test_decode_of_empty_splits_and_empty_sequences_is_finite(kv: str) -> None:
    """LMCache 3092, sglang 38142, aiter 5004: -inf - -inf where a split, or all of a sequence, holds no key."""
    q, cache, _, scale = example_args(ops.decode_attention, **{**DECODE, "kv": kv, "t": 200})
    cache = replace(cache, block_table=cache.block_table[:1].expand(2, -1))
    for short in (0, 1, 64, 65):
        lengths = torch.tensor([200, short], device=DEVICE).int()
        out, lse = TRITON(q, cache, lengths, scale, "fast", True, config=TRITON.configs[0])
        assert torch.isfinite(out).all() and torch.isfinite(lse[0]).all()
        assert lse[1].isneginf().all() == (short == 0) and bool(out[1].any()) == (short > 0)


@pytest.mark.on_gpu
def test_decode_of_large_logits_does_not_overflow() -> None:
    """vllm 56578: powers that overflow. The largest score is taken off before any is raised."""
    q, cache, *rest = example_args(ops.decode_attention, **{**DECODE, "dtype": "float32"})
    assert_matches_reference(
        ops.decode_attention, TRITON, TRITON.configs[0], (q * 100, replace(cache, k_pages=cache.k_pages * 100), *rest)
    )


def seconds(programs: int, room: int) -> int:
    """Return the time that a plan takes by its own model."""
    splits = plan_splits("fast", programs, room, MIN_SPLIT, PROGRAMS).num_splits
    return estimated_time(programs, room, splits, MIN_SPLIT, PROGRAMS)


def test_estimated_time_grows_at_most_linearly() -> None:
    """vllm 48076: a cliff where a batch grows past the point up to which sequences are split."""
    for programs in (1, 2, 8, 16, 33, 64, 100, 132, 256, 264, 272, 512):
        for room in (64, 256, 1024, 1040, 4096, 32768):
            assert seconds(2 * programs, room) <= 2 * seconds(programs, room)
            assert seconds(programs, 2 * room) <= 2 * seconds(programs, room)


def test_short_contexts_have_few_splits_and_long_ones_fill_the_gpu() -> None:
    """sglang 2271, 35801: eight splits of 32k keys at most, and 29 of 256."""
    assert plan_splits("fast", 8, 256, MIN_SPLIT, PROGRAMS).max_splits <= 256 // MIN_SPLIT
    for room in (8192, 32768):
        plan = plan_splits("fast", 8, room, MIN_SPLIT, PROGRAMS)
        assert 8 * plan.max_splits > PROGRAMS * 3 // 4
    assert plan_splits("fast", 64 * 8, 1024, MIN_SPLIT, PROGRAMS).max_splits <= 4
    for room in (1, 63, 64, 65, 4096, 10**6):
        longest = plan_splits("fast", 10**4, room, MIN_SPLIT, PROGRAMS).max_splits
        assert longest == -(-room // MAX_SPLIT)  # a ragged batch's longest
        assert plan_splits("batch_invariant", 3, room, MIN_SPLIT, PROGRAMS).max_splits == -(-room // INVARIANT_SPLIT)


def test_decode_with_a_wide_block_table_matches_the_reference() -> None:
    """flash-attention 1000, 1465: as many splits as the longest sequence there might be would need."""
    q, cache, lengths, scale = example_args(ops.decode_attention, **DECODE)
    table = cache.block_table
    args = (q, replace(cache, block_table=torch.cat((table, table[:, -1:].expand(-1, 4000)), 1)), lengths, scale)
    assert_matches_reference(ops.decode_attention, TRITON, TRITON.configs[0], args)


@pytest.mark.parametrize("kv", ["int8", "int4"])
@given(ratio=st.sampled_from([1e2, 1e4, 1e5, 1e6, 1e8]), at=st.integers(0, 15), seed=st.integers(0, 99))
def test_a_large_value_with_a_small_weight_keeps_the_others_exact(kv: str, ratio: float, at: int, seed: int) -> None:
    """Its scale is so large beside the others' that weight times scale over it is no number of float16.

    The error is bounded by the kernel's roundings: products of weight and scale, over their largest, and outputs are
    rounded to float16; codes are exact. (The budget of `error_budget`, from random perturbations, is now and then below
    that where values of both signs cancel.)
    """
    rng, d = torch.Generator().manual_seed(seed), 32
    k, v = 0.3 * torch.randn(16, 1, d, generator=rng), 100 / ratio * torch.randn(16, 1, d, generator=rng)
    k[at], v[at] = -8, 100 * torch.randn(1, d, generator=rng)
    k_pages, v_pages = (quantize_kv(x[None].to(DEVICE), ops.empty_kv_pages((0, d), kv, DEVICE)) for x in (k, v))
    q, table, length = torch.ones(1, 1, d, dtype=torch.float16), torch.zeros(1, 1).int(), torch.tensor([16]).int()
    args = map_tensors(lambda x: x.to(DEVICE), (q, ops.PagedKV(k_pages, v_pages, table), length, d**-0.5))
    (exact,) = float64_reference(ops.decode_attention, args)
    keys, values = (pages.dequantize().double()[0, :, 0] for pages in (k_pages, v_pages))
    weights = (keys.sum(-1) * d**-0.5).softmax(0)[:, None]  # [t, 1], as q is 1
    assert isinstance(v_pages, ops.QuantizedKVPages)
    scales = v_pages.scales.double().view(-1, 1)
    u, smallest = unit_roundoff(torch.float16), 2.0**-25  # half the smallest number of float16
    bound = 2 * u * (weights * values).abs().sum(0) + u * exact.abs() + smallest
    bound += smallest * (weights * scales).max() * (values / scales).abs().sum(0)
    assert ((TRITON(*args, config=TRITON.configs[0]) - exact).abs() <= bound).all()


def test_scales_read_beyond_the_sequence_length_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin of the kernel that reads one token more is found on quantized pages."""

    def one_more(q, cache, lengths, scale, *more):
        return ops.decode_attention.reference(q, cache, lengths + 1, scale, *more)

    impl = Impl("decode_attention", "one_more", one_more, [{}], TRITON.file)
    with pytest.raises(MismatchError):
        assert_matches_reference(
            ops.decode_attention, impl, {}, example_args(ops.decode_attention, **{**DECODE, "kv": "int4"})
        )
