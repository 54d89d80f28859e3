"""Decoding over a paged cache: splits, parts merged by their log-sum-exp, and what "batch_invariant" promises."""

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from mutants import Plant, by_rule, exchange, plant  # noqa: F401 (a fixture)
from torch import Tensor

from bench.correctness.error_budget import (
    DEVICE,
    assert_matches_reference,
    check_within_budget,
    error_budget,
    example_args,
)
from bench.correctness.guarded_memory import MismatchError, bit_pattern, map_tensors
from vila_triton import ops
from vila_triton.ops import PagedKV
from vila_triton.registry import REFERENCE, Impl, discover

discover()
kernel = import_module("vila_triton.kernels.decode_attention")  # pyright sees no module behind that door
SplitPlan = import_module("vila_triton.kernels._split_kv").SplitPlan


DECODE = ops.decode_attention
IMPLS = DECODE.impls
SIZES = dict(b=2, t=200, g=1, ratio=3, d=32, l=16, dtype="float16", kv="plain", numerics="fast", seed=1)
KINDS = pytest.mark.parametrize("kv", ["plain", "int8", "int4"])
OTHER = {"BLOCK_N": 16, "PROGRAMS_PER_SM": 1, "num_warps": 1, "num_stages": 1}  # a config that a tuned table might name


def drawn(**changes: Any) -> tuple:
    """(q, cache, seq_lens, softmax_scale)."""
    return example_args(DECODE, **{**SIZES, **changes})


def run(name: str, args: tuple, *more: Any, config: dict | None = None) -> Any:
    impl = IMPLS[name]
    return impl(*args, *more, config=impl.configs[0] if config is None else config)


@pytest.mark.parametrize("num_splits", [1, 3, 40])
@KINDS
def test_any_number_of_splits_matches_the_reference(kv: str, num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "plan_splits", lambda *_: SplitPlan(num_splits, 64, 2048, num_splits))
    assert_matches_reference(DECODE, IMPLS["triton"], IMPLS["triton"].configs[0], drawn(kv=kv, t=410))


def test_largest_score_is_kept_over_more_splits_than_are_merged_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ** (score - largest) of an early split overflows if the largest score of the later ones takes its place."""
    monkeypatch.setattr(kernel, "plan_splits", lambda *_: SplitPlan(26, 16, 2048, 26))
    q, cache, _, scale = drawn(b=1, ratio=1, d=16, t=410, dtype="float32")
    k = 0.1 * torch.randn(410, 1, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    k[7] += 120 * 16**0.5 / 16
    slots = (cache.block_table[0].long()[:, None] * 16 + torch.arange(16, device=DEVICE)).flatten()[:410]
    ops.kv_write.reference(k, k, cache.k_pages, cache.v_pages, slots)
    args = (torch.ones_like(q), cache, torch.tensor([410], dtype=torch.int32, device=DEVICE), scale)
    assert_matches_reference(DECODE, IMPLS["triton"], OTHER, args)


@KINDS
def test_slots_past_the_end_of_sequences_may_hold_nan(kv: str) -> None:
    q, cache, lengths, scale = drawn(kv=kv, t=45, l=64, dtype="float32")
    unused = torch.ones(cache.k_pages.shape[:2], dtype=torch.bool, device=DEVICE)
    for pages, length in zip(cache.block_table.long(), lengths.tolist()):
        tokens = torch.arange(length, device=DEVICE)
        unused[pages[tokens // cache.page_size], tokens % cache.page_size] = False
    for x in (*ops.page_tensors(cache.k_pages), *ops.page_tensors(cache.v_pages)):
        if x.is_floating_point():
            x[unused] = math.nan
    for config in IMPLS["triton"].configs:
        assert_matches_reference(DECODE, IMPLS["triton"], config, (q, cache, lengths, scale))


@pytest.mark.on_gpu
@KINDS
def test_log_sum_exp_matches_the_reference(kv: str) -> None:
    q, cache, lengths, scale = drawn(kv=kv)
    for room in (1, 13):  # of one split, and of several
        own = lengths.clamp(1, room * 16)
        args = (q[:1], replace(cache, block_table=cache.block_table[:1, :room]), own[:1], scale, "fast", True)
        assert_matches_reference(DECODE, IMPLS["triton"], IMPLS["triton"].configs[0], args)


@pytest.mark.parametrize("name", [REFERENCE, "triton"])
@KINDS
def test_merging_attention_to_parts_of_the_pages_equals_attention_to_all(name: str, kv: str) -> None:
    @settings(max_examples=4)
    @given(ends=st.lists(st.integers(0, 13), max_size=3).map(sorted), seed=st.integers(0, 2**16))
    def holds(ends: list[int], seed: int) -> None:
        q, cache, lengths, scale = args = drawn(kv=kv, dtype="float32", seed=seed)
        l, table = cache.page_size, cache.block_table
        last = table.shape[1]
        parts = [
            run(
                name,
                (
                    q,
                    replace(cache, block_table=table[:, a:b]),
                    (lengths - a * l).clamp(0, (b - a) * l),
                    scale,
                    "fast",
                    True,
                ),
            )
            for a, b in zip([0, *ends], [*ends, last])
            if a < b
        ]
        out, lse = ops.merge_attention_states(*(torch.stack(x) for x in zip(*parts)))
        (exact,), (allowed,) = error_budget(DECODE, args)
        check_within_budget(0, out, exact, (len(parts) + 1) * allowed)  # a budget for each call and one for the merge
        assert torch.equal(lse.isneginf(), (lengths == 0)[:, None].expand_as(lse))
        assert not out[lengths == 0].any()
        one, rest = (
            ops.merge_attention_states(*(torch.stack(x) for x in zip(*some)))
            for some in (parts[:1], parts[1:] or parts[:1])
        )
        if len(parts) > 1:  # in another grouping
            again, _ = ops.merge_attention_states(torch.stack((one[0], rest[0])), torch.stack((one[1], rest[1])))
            check_within_budget(0, again, exact, (len(parts) + 2) * allowed)

    holds()


def test_merging_ignores_parts_without_keys() -> None:
    nan, none = (torch.full(shape, x, device=DEVICE) for shape, x in (((2, 3, 4), math.nan), ((2, 3), -math.inf)))
    out, lse = ops.merge_attention_states(nan[None], none[None])
    assert not out.any() and lse.isneginf().all()
    some, sums = torch.randn(2, 3, 4, device=DEVICE), torch.randn(2, 3, device=DEVICE)
    out, lse = ops.merge_attention_states(torch.stack((nan, some)), torch.stack((none, sums)))
    assert torch.equal(out, some) and torch.equal(lse, sums)
    with pytest.raises(ValueError, match=r"merge_attention_states: outputs are \[2, 2, 3, 4\] and lses \[2, 3\]"):
        ops.merge_attention_states(torch.stack((nan, some)), none)


def moved(args: tuple, l: int, seed: int, room: int) -> tuple:
    """The same tokens in pages of l tokens in another order, and a table with room for more."""
    q, cache, lengths, scale = args
    table = cache.block_table
    count = -(-int(lengths.max()) // l) if len(lengths) else 0
    order = torch.randperm(len(lengths) * count + 1, generator=torch.Generator().manual_seed(seed)).int().to(DEVICE)
    last = len(order) - 1
    new_table = torch.cat((order[:last].view(len(lengths), count), order[last:].expand(len(lengths), room)), 1)

    def spread(x: Tensor) -> Tensor:
        new = x.new_full((last + 1, l, *x.shape[2:]), float("nan") if x.is_floating_point() else 1)
        for i, t in enumerate(lengths.tolist()):
            at = torch.arange(t, device=DEVICE)
            old = x[table[i, at // x.shape[1]].long(), at % x.shape[1]]
            new[new_table[i, at // l].long(), at % l] = old
        return new

    k_pages, v_pages = map_tensors(spread, (cache.k_pages, cache.v_pages))
    return q, PagedKV(k_pages, v_pages, new_table), lengths, scale


@pytest.mark.on_gpu
@pytest.mark.parametrize("name", IMPLS)
@KINDS
def test_batch_invariant_bits_do_not_depend_on_batch_pages_capacity_or_config(name: str, kv: str) -> None:
    """https://github.com/Dao-AILab/flash-attention/pull/2448 and https://github.com/sgl-project/sglang/pull/10694"""
    args = drawn(t=700, kv=kv, b=3)  # more than two splits
    if not supports(name, args):
        pytest.skip(f"{name} does not read {kv} pages")
    check_invariance(IMPLS[name], args)


def supports(name: str, args: tuple) -> bool:
    try:
        return run(name, args) is not None
    except ValueError:
        return False


def check_invariance(impl: Impl, args: tuple) -> None:
    expected = impl(*args, "batch_invariant", config=impl.configs[0])

    @settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
    @example(rows=[0], l=16, room=0, config=impl.configs[-1], seed=0)
    @given(
        rows=st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=5),
        l=st.sampled_from([256, 128, 64, 32, 16, 20, 1]),
        room=st.sampled_from([0, 1, 40]),
        config=st.sampled_from([*impl.configs, *([OTHER] if impl.name == "triton" else [])]),
        seed=st.integers(0, 2**16),
    )
    def holds(rows: list[int], l: int, room: int, config: dict, seed: int) -> None:
        q, cache, lengths, scale = moved(args, l, seed, room)
        some = (q[rows], replace(cache, block_table=cache.block_table[rows]), lengths[rows], scale)
        assert torch.equal(bit_pattern(impl(*some, "batch_invariant", config=config)), bit_pattern(expected[rows]))

    holds()


SHORTCUTS = {
    "its config": by_rule("< becomes <=", "numerics == 'batch_invariant'"),
    "one sequence alone": exchange(
        "numerics", "numerics if b > 1 else 'fast'", function="decode_attention_triton", call="plan_splits"
    ),
}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_mutants_that_are_not_batch_invariant_are_detected(shortcut: str, plant: Plant) -> None:  # noqa: F811
    plant("decode_attention", "unsteady", SHORTCUTS[shortcut])
    discover()
    with pytest.raises(AssertionError):
        for seed in range(4):
            check_invariance(IMPLS["unsteady"], drawn(t=700, seed=seed))


BUGS = {
    "pages are not looked up ahead": exchange("n + BLOCK_N", "n", call="load_page_ids"),
    "splits overlap": exchange("split * keys", "tl.maximum(split * keys - BLOCK_N, 0)"),
    "a head is not written": by_rule("shift a bound", "rows < QUERIES_PER_KV"),
    "sums of splits are halves": by_rule("dtype of a sum", "torch.float32", statement="acc = torch.empty"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_mutants_are_detected(bug: str, plant: Plant) -> None:  # noqa: F811
    plant("decode_attention", "planted", BUGS[bug])
    discover()
    impl = IMPLS["planted"]
    with pytest.raises(MismatchError):
        for seed in range(2):
            assert_matches_reference(
                DECODE, impl, impl.configs[0], drawn(seed=seed, t=700, dtype="float32", numerics="batch_invariant")
            )


@pytest.mark.parametrize("d", [8, 40, 72, 80, 96, 112, 160, 256])
def test_every_head_dim_matches_the_reference(d: int) -> None:
    for i, kv in enumerate(("plain", "int8", "int4")):
        args = drawn(d=d, kv=kv, b=2, t=90)
        assert_matches_reference(DECODE, IMPLS["triton"], IMPLS["triton"].configs[i % 2], args)


@pytest.mark.parametrize("l", [1, 3, 8, 16, 32, 64, 128, 256])
def test_sequence_lengths_around_every_page_size_match_the_reference(l: int) -> None:
    q, *_ = drawn(b=5)
    _, cache, held, scale = drawn(b=1, t=260)
    lengths = torch.tensor([0, 1, l - 1, l, l + 1], device=DEVICE).int().minimum(held)
    cache = replace(cache, block_table=cache.block_table.expand(5, -1))
    args = moved((q, cache, lengths, scale), l, seed=l, room=1)
    assert_matches_reference(DECODE, IMPLS["triton"], IMPLS["triton"].configs[1], args)
