"""Prefill: what must not change a bit under "batch_invariant", the log-sum-exp, and every head dim and page size."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Plant, by_rule, exchange, plant  # noqa: F401 (a fixture)
from torch import Tensor

from bench.correctness.error_budget import DEVICE, assert_matches_reference, error_budget, example_args
from bench.correctness.guarded_memory import MismatchError, bit_pattern
from vila_triton.ops import PagedKV, RaggedBatch, kv_write, merge_attention_states, prefill_attention
from vila_triton.registry import REFERENCE, Impl, discover
from vila_triton.registry.search_space import Config

discover()
NAMES = [name for name in prefill_attention.impls if name not in (REFERENCE, "aten")]  # torch's own says Unsupported
CASES: list = [
    pytest.param(name, i, id=f"{name}-{i}") for name in NAMES for i in range(len(prefill_attention.impls[name].configs))
]
SIZES = dict(b=3, s=37, t=70, g=2, ratio=3, d=32, l=16, dtype="float16", kv="plain", numerics="fast", seed=1)
OTHER = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}  # one that a tuned table might name
Sequence = tuple[Tensor, Tensor, Tensor]  # q [s, h, d], k and v [s, g, d]


def sequence(s: int, seed: int, dtype: torch.dtype = torch.float16, d: int = 24) -> Sequence:
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(s, h, d, generator=rng).to(DEVICE, dtype) for h in (3, 1, 1))
    return q, k, v


def in_chunks(
    impl: Impl, config: Config, mine: Sequence, cuts: list[int], l: int = 64, seed: int = 0, company: tuple = ()
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a sequence, prefilled in chunks on shuffled pages of l tokens, with `company` around it."""
    q, k, v = mine
    pages = -(-len(q) // l) + 1
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).int().to(DEVICE)
    k_pages, v_pages = (k.new_full((pages, l, *k.shape[1:]), float("nan")) for _ in range(2))
    found = []
    for begin, end in pairwise(sorted({0, *cuts, len(q)})):
        rows_of_batch = [*company[:1], tuple(x[begin:end] for x in mine), *company[1:]]
        start = torch.tensor([0, *(len(x[0]) for x in rows_of_batch)]).cumsum(0).int().to(DEVICE)
        context = [begin if i == len(company[:1]) else 0 for i in range(len(rows_of_batch))]
        batch = RaggedBatch(start, torch.tensor(context).int().to(DEVICE))
        new = [torch.cat(x) for x in zip(*rows_of_batch)]
        cache = PagedKV(k_pages, v_pages, order.expand(len(rows_of_batch), -1))
        out = impl(*new, cache, batch, 0.3, "batch_invariant", True, config=config)
        rows = slice(*start[len(company[:1]) :][:2].tolist())
        found.append([x[rows] for x in out])
        at = torch.arange(begin, end, device=DEVICE)
        kv_write.reference(k[begin:end], v[begin:end], k_pages, v_pages, order[at // l].long() * l + at % l)
    out, lse = (torch.cat(x) for x in zip(*found))
    return out, lse


def check_invariance(impl: Impl, examples: int) -> None:
    mine, others = sequence(131, seed=1), [sequence(n, seed=n) for n in (5, 1, 44)]
    configs = [*impl.configs, *([OTHER] if impl.space else [])]
    expected = in_chunks(impl, configs[0], mine, [])

    @settings(max_examples=examples)
    @given(
        cuts=st.lists(st.integers(1, 130), max_size=2, unique=True),
        l=st.sampled_from([16, 32, 64, 128, 256, 20]),
        config=st.sampled_from(configs[::-1]),
        company=st.permutations(others).flatmap(lambda rows: st.sampled_from([rows[:n] for n in range(4)])),
        seed=st.integers(0, 2**16),
    )
    def holds(cuts: list[int], l: int, config: Config, company: list[Sequence], seed: int) -> None:
        for got, want in zip(in_chunks(impl, config, mine, cuts, l, seed, tuple(company)), expected):
            assert torch.equal(bit_pattern(got), bit_pattern(want))

    holds()


@pytest.mark.on_gpu
@pytest.mark.usefixtures("dots_in_order")
@pytest.mark.parametrize("name", NAMES)
def test_batch_invariant_bits_do_not_depend_on_chunks_pages_batch_or_config(name: str) -> None:
    check_invariance(prefill_attention.impls[name], max(3, settings().max_examples // 2))


@pytest.mark.on_gpu
@pytest.mark.parametrize("name, config", CASES)
@pytest.mark.parametrize("kv", ["plain", "int8", "int4"])
def test_log_sum_exp_matches_the_reference(name: str, config: int, kv: str) -> None:
    args = example_args(prefill_attention, **{**SIZES, "kv": kv})
    impl = prefill_attention.impls[name]
    try:
        assert_matches_reference(prefill_attention, impl, impl.configs[config], (*args, "fast", True))
    except ValueError as reason:
        pytest.skip(str(reason))


@pytest.mark.on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_merging_chunk_and_context_attention_equals_attention_to_both(name: str) -> None:
    """Queries see the chunk causally and all of the context: a call without pages, one whose only keys are in them."""
    impl = prefill_attention.impls[name]
    args = example_args(prefill_attention, **{**SIZES, "b": 1, "dtype": "float32"})
    q, k, v, cache, batch, scale = args
    keys, values = (x.repeat_interleave(3, 1).double() for x in cache.gather(0, int(batch.context_lens)))
    scores = torch.einsum("shd,thd->sht", q.double(), keys) * scale
    past = torch.einsum("sht,thd->shd", scores.softmax(-1), values), scores.logsumexp(-1)
    alone = replace(batch, context_lens=0 * batch.context_lens)
    own = impl(q, k, v, cache, alone, scale, return_lse=True)
    merged = merge_attention_states(*(torch.stack((a.double(), b)) for a, b in zip(own, past)))
    whole = (*args, "fast", True)
    for got, exact, allowed in zip(merged, *error_budget(prefill_attention, whole)):
        assert ((got - exact).abs() <= 2 * allowed).all()  # one budget for each of two calls, as they are


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [8, 16, 40, 48, 56, 72, 80, 96, 112, 160, 192, 256])
def test_every_head_dim_matches_the_reference(name: str, d: int) -> None:
    impl = prefill_attention.impls[name]
    args = example_args(prefill_attention, **{**SIZES, "d": d, "b": 2})
    assert_matches_reference(prefill_attention, impl, impl.configs[-1], args)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("l", [16, 32, 64, 128, 256])
def test_context_lengths_around_every_page_size_match_the_reference(name: str, l: int) -> None:
    impl = prefill_attention.impls[name]
    for t in (0, 1, l - 1, l, l + 1):
        args = example_args(prefill_attention, **{**SIZES, "l": l, "t": t, "s": 5, "b": 1, "ratio": 1, "g": 1})
        assert_matches_reference(prefill_attention, impl, impl.configs[0], args)


BUGS = {
    "the last cached token is left out": by_rule("shift a bound", "tokens < context_len"),
    "a query sees the next token": by_rule("shift a bound", "tokens[None, :] <= position"),
    "the tile before the diagonal is skipped": by_rule(
        "shift a bound", "range(begin, diagonal, BLOCK_N)", after="diagonal - BLOCK_N"
    ),
    "no mask on the diagonal": exchange(
        "context_len + row // QUERIES_PER_KV + 1", "context_len + row // QUERIES_PER_KV + BLOCK_N"
    ),
    "the context begins at the second tile": by_rule(
        "shift a bound", "range(0, full_end, BLOCK_N)", after="0 + BLOCK_N"
    ),
    "rows past the chunk": by_rule("shift a bound", "tl.minimum((row + BLOCK_M - 1)", after="num_queries + 1"),
    "heads of the next KV head": exchange("kv_head", "kv_head + 1", call="query_and_head"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what reads too far computes with garbage
@pytest.mark.parametrize("bug", BUGS)
def test_mutants_are_detected(bug: str, plant: Plant) -> None:  # noqa: F811
    plant("prefill_attention", "mine", BUGS[bug])
    discover()
    impl = prefill_attention.impls["mine"]
    with pytest.raises(MismatchError):
        for t in (70, 64):  # the second leaves a tile that all rows of a program see
            args = example_args(prefill_attention, **{**SIZES, "s": 70, "t": t, "dtype": "float32"})
            assert_matches_reference(prefill_attention, impl, impl.configs[-1], args)


@pytest.mark.usefixtures("dots_in_order")
def test_a_mutant_whose_tile_depends_on_the_config_is_detected(plant: Plant) -> None:  # noqa: F811
    edit = by_rule("< becomes <=", "numerics == 'batch_invariant'", function="prefill_attention_triton")
    plant("prefill_attention", "mine", edit)
    discover()
    with pytest.raises(AssertionError):
        check_invariance(prefill_attention.impls["mine"], 8)
