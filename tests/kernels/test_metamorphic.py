"""Laws that hold whatever the numbers are, for every implementation with its first config.

Two calls that mean the same may differ by what `faithful.budget` allows each of them. Where a law leaves the arithmetic
as it is (other pages, other later tokens), not a bit may change.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.correctness.error_budget import (
    DEVICE,
    call_or_reject,
    error_budget,
    example_args,
    example_strategy,
    run_property,
    unit_roundoff,
)
from bench.correctness.guarded_memory import map_tensors
from vila_triton import ops
from vila_triton.ops import PagedKV, RaggedBatch
from vila_triton.ops.int4_tiles import pack_tiles
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.registry import Op, discover, use

discover()


def each_impl(op: Op) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("impl", op.impls, ids=lambda name: f"{op.name}-{name}")


def run(op: Op, impl: str, *args: object) -> Tensor:
    with use(**{op.name: impl}):
        return call_or_reject(op, *args)


def assert_same(a: Tensor, b: Tensor, op: Op, args: tuple) -> None:
    """a and b are the output for args, each within the budget of the exact one."""
    _, (allowed,) = error_budget(op, args)
    assert_within(a, b, allowed)


def assert_within(a: Tensor, b: Tensor, allowed: Tensor) -> None:
    """a and b differ at most by twice the budget of each element."""
    worst = ((a.double() - b.double()).abs() / (2 * allowed)).amax() if a.numel() else 0
    assert worst <= 1, f"they differ by {worst:.1f} times what rounding explains"


def fill(cache: PagedKV, k: Tensor, v: Tensor) -> None:
    """Cache the tokens of the one sequence, from its first position on."""
    positions = torch.arange(len(k), device=k.device)
    pages, rows = cache.block_table[0][positions // cache.page_size].long(), positions % cache.page_size
    ops.kv_write.reference(k, v, cache.k_pages, cache.v_pages, pages * cache.page_size + rows)


def empty_cache(tokens: int, page_size: int, like: Tensor) -> PagedKV:
    """NaN pages for one sequence of up to `tokens` tokens; its block table [1, pages] is in reversed order."""
    count = -(-tokens // page_size) + 1
    k_pages, v_pages = (like.new_full((count, page_size, *like.shape[1:]), float("nan")) for _ in range(2))
    return PagedKV(k_pages, v_pages, torch.arange(count - 1, -1, -1, device=like.device).int()[None])


def ints(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE).int()


@each_impl(ops.prefill_attention)
def test_chunked_prefill_equals_prefill_at_once(impl: str) -> None:
    op = ops.prefill_attention

    @given(sizes=example_strategy(op), cut=st.floats(0, 1))
    def check(sizes: dict, cut: float) -> None:
        q, k, v, *_, scale = example_args(op, **{**sizes, "b": 1, "t": 0, "numerics": "fast"})
        s = len(q)
        cache = empty_cache(s, sizes["l"], k)
        whole = (q, k, v, cache, RaggedBatch(ints(0, s), ints(0)), scale)
        expected = run(op, impl, *whole)
        c = round(cut * s)
        first = run(op, impl, q[:c], k[:c], v[:c], cache, RaggedBatch(ints(0, c), ints(0)), scale)
        fill(cache, k[:c], v[:c])
        second = run(op, impl, q[c:], k[c:], v[c:], cache, RaggedBatch(ints(0, s - c), ints(c)), scale)
        assert_same(torch.cat((first, second)), expected, op, whole)

    run_property(check)


@each_impl(ops.prefill_attention)
def test_later_tokens_do_not_change_earlier_outputs(impl: str) -> None:
    op = ops.prefill_attention

    @given(sizes=example_strategy(op), cut=st.floats(0, 1))
    def check(sizes: dict, cut: float) -> None:
        q, k, v, *rest = example_args(op, **{**sizes, "b": 1})
        c = round(cut * len(q))
        before = run(op, impl, q, k, v, *rest)
        k, v = (torch.cat((x[:c], 3 - x[c:])) for x in (k, v))
        assert torch.equal(run(op, impl, q, k, v, *rest)[:c], before[:c])

    run_property(check)


@each_impl(ops.prefill_attention)
def test_sequences_of_a_prefill_batch_are_independent(impl: str) -> None:
    op = ops.prefill_attention

    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        args = q, k, v, cache, batch, *rest = example_args(op, **sizes)
        together, (_, (allowed,)) = run(op, impl, *args), error_budget(op, args)
        for i in range(batch.num_seqs):
            rows = slice(*batch.query_start_loc[i : i + 2].tolist())
            one = RaggedBatch(ints(0, rows.stop - rows.start), batch.context_lens[i : i + 1])
            own = replace(cache, block_table=cache.block_table[i : i + 1])
            alone = run(op, impl, q[rows], k[rows], v[rows], own, one, *rest)
            assert_within(alone, together[rows], allowed[rows])

    run_property(check)


@each_impl(ops.decode_attention)
def test_sequences_of_a_decode_batch_are_independent(impl: str) -> None:
    op = ops.decode_attention

    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        args = q, cache, lengths, *rest = example_args(op, **sizes)
        together, (_, (allowed,)) = run(op, impl, *args), error_budget(op, args)
        for i in range(len(q)):
            row = slice(i, i + 1)
            own = replace(cache, block_table=cache.block_table[row])
            assert_within(run(op, impl, q[row], own, lengths[row], *rest), together[row], allowed[row])

    run_property(check)


@each_impl(ops.decode_attention)
def test_decode_equals_the_last_row_of_prefill(impl: str) -> None:
    op, prefill = ops.decode_attention, ops.prefill_attention

    @given(sizes=example_strategy(prefill))
    def check(sizes: dict) -> None:
        plain = example_args(prefill, **{**sizes, "b": 1, "kv": "plain"})
        q, k, v, cache, batch, *rest = plain
        t, s = int(batch.context_lens[0]), len(q)
        last = prefill.reference(*plain)[-1:]
        new_cache = empty_cache(t + s, sizes["l"], k)
        k, v = (torch.cat((old, new)) for old, new in zip(cache.gather(0, t), (k, v)))
        fill(new_cache, k, v)
        args = (q[-1:], new_cache, ints(t + s), *rest)
        assert_same(run(op, impl, *args), last, op, args)

    run_property(check)


PAGED: list = [
    pytest.param(op, impl, id=f"{op.name}-{impl}")
    for op in (ops.prefill_attention, ops.decode_attention)
    for impl in op.impls
]


def split(op: Op, args: tuple) -> tuple[tuple, PagedKV, tuple]:
    """The arguments as (those before the cache, the cache, those after it)."""
    i = 3 if op is ops.prefill_attention else 1
    return args[:i], args[i], args[i + 1 :]


@pytest.mark.parametrize("op, impl", PAGED)
def test_permuted_pages_give_the_same_bits(op: Op, impl: str) -> None:
    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        args = example_args(op, **sizes)
        new, cache, rest = split(op, args)
        to = torch.randperm(cache.k_pages.shape[0], generator=torch.Generator().manual_seed(sizes["seed"])).to(DEVICE)
        pages = (cache.k_pages, cache.v_pages)
        k_pages, v_pages = map_tensors(lambda x: x.new_empty(x.shape).index_copy_(0, to, x), pages)
        after = run(op, impl, *new, PagedKV(k_pages, v_pages, to[cache.block_table.long()].int()), *rest)
        assert torch.equal(after, run(op, impl, *args))

    run_property(check)


@pytest.mark.parametrize("op, impl", PAGED)
def test_half_the_page_size_gives_the_same_output(op: Op, impl: str) -> None:
    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        args = example_args(op, **{**sizes, "l": 32})
        new, cache, rest = split(op, args)
        pages, table = (cache.k_pages, cache.v_pages), cache.block_table
        k_pages, v_pages = map_tensors(lambda x: x.unflatten(1, (2, 16)).flatten(0, 1), pages)  # page i -> 2i, 2i + 1
        halved = PagedKV(k_pages, v_pages, torch.stack((2 * table, 2 * table + 1), -1).flatten(1))
        assert_same(run(op, impl, *new, halved, *rest), run(op, impl, *args), op, args)

    run_property(check)


@pytest.mark.parametrize("op, impl", PAGED)
def test_grouped_query_attention_equals_repeated_kv_heads(op: Op, impl: str) -> None:
    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        args = example_args(op, **sizes)
        (q, *kv), cache, rest = split(op, args)
        new = map_tensors(lambda x: x.repeat_interleave(sizes["ratio"], 1), kv)
        pages = (cache.k_pages, cache.v_pages)
        k_pages, v_pages = map_tensors(lambda x: x.repeat_interleave(sizes["ratio"], 2), pages)
        repeated = PagedKV(k_pages, v_pages, cache.block_table)
        assert_same(run(op, impl, q, *new, repeated, *rest), run(op, impl, *args), op, args)

    run_property(check)


@each_impl(ops.encoder_attention)
def test_encoder_attention_ignores_the_order_of_keys(impl: str) -> None:
    op = ops.encoder_attention

    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        args = q, k, v, scale = example_args(op, **sizes)
        assert_same(run(op, impl, q, k.flip(1), v.flip(1), scale), run(op, impl, *args), op, args)

    run_property(check)


@each_impl(ops.int4_matmul)
def test_int4_matmul_equals_linear_on_the_dequantized_weight(impl: str) -> None:
    op = ops.int4_matmul

    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        args = x, w, *terms = example_args(op, **sizes)
        assert_same(run(op, impl, *args), ops.linear.reference(x, ops.dequantize(w, x.dtype), *terms), op, args)

    run_property(check)


@given(n=st.integers(1, 40), k=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_packed_codes_are_unpacked_unchanged(n: int, k: int, seed: int) -> None:
    q = torch.randint(0, 16, (n, 8 * k), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    q[0, :8], q[-1, -8:] = torch.arange(8), torch.arange(8, 16)  # all 16, the one that sets the sign bit included
    q = q.to(DEVICE)
    packed = pack_tiles(q)
    assert packed.dtype == torch.int32 and packed.shape == (-(-n // 16), -(-k // 8), 32, 4)
    scales, zeros = (torch.full((1, n), x, device=DEVICE) for x in (1.0, 0.0))
    assert torch.equal(unpack_codes(ops.Int4(packed, scales, zeros, 8 * k)), q)


@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**16),
)
def test_quantized_weights_are_within_half_a_step(
    n: int, groups: int, group: int, dtype: torch.dtype, shift: float, seed: int
) -> None:
    """The range is 15 steps and 0 is one of them, but the step is rounded, which moves the ends by 15 roundings."""
    rng = torch.Generator().manual_seed(seed)
    plain = (torch.randn(n, groups * group, generator=rng) + shift).to(DEVICE, dtype)
    w = ops.Int4.pack(plain, group)
    steps = w.scales.double().t().repeat_interleave(group, 1)
    off = (ops.dequantize(w, torch.float64) - plain.double()).abs() / steps
    assert off.max() <= 0.5 + 15 * unit_roundoff(dtype)
