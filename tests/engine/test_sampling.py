"""The choice of tokens: kept sets are those of transformers, draws those of a generator in Python's numbers, and both
are bitwise the same in any batch.
"""

import math
from functools import partial
from typing import Any

import pytest
import sampling_oracle
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vila_triton.engine import draws, sampling
from vila_triton.engine.sampling import NO_TOKEN, SamplingParams, SamplingRows, choose_tokens

SEEDS = st.integers(0, 2**63 - 1)


def rows_of(settings: list[dict[str, Any]], seeds: list[int] | None = None) -> SamplingRows:
    """Rows of one batch, each with settings of its own."""
    each = [
        SamplingParams.from_generate_kwargs(1, seed=seed, **how).rows(1, "cpu")
        for how, seed in zip(settings, seeds or [0] * len(settings))
    ]
    columns = {
        name: torch.cat([getattr(rows, name) for rows in each])
        for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seeds")
    }
    return SamplingRows(
        **columns,
        samples=any(rows.samples for rows in each),
        largest_top_k=max(rows.largest_top_k for rows in each),
        uses_top_p=any(rows.uses_top_p for rows in each),
    )


def scores_of_transformers(logits: Tensor, how: dict[str, Any], text: Tensor) -> Tensor:
    """Logits [b, v] after transformers' processors, behind texts [b, t]."""
    ids: Any = text
    scores: Any = logits
    if "repetition_penalty" in how:
        scores = RepetitionPenaltyLogitsProcessor(how["repetition_penalty"])(ids, scores)
    if "temperature" in how:
        scores = TemperatureLogitsWarper(how["temperature"])(ids, scores)
    if "top_k" in how:
        scores = TopKLogitsWarper(how["top_k"])(ids, scores)
    if how.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(how["top_p"])(ids, scores)
    return scores


def random_settings(rng: torch.Generator, v: int) -> dict[str, Any]:
    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=rng))]

    how: dict[str, Any] = {
        "temperature": pick(None, 0.3, 0.7, 1.7, 100.0),
        "top_k": pick(None, 1, 2, 5, v - 1, v, v + 3, 50),
        "top_p": pick(None, 1e-6, 0.1, 0.3, 0.5, 0.6, 0.9, 0.95, 1.0),
        "repetition_penalty": pick(None, 1.3, 0.7),
    }
    return {"do_sample": True} | {name: value for name, value in how.items() if value}


@pytest.mark.parametrize("seed", range(4))
def test_kept_sets_of_2500_rows_with_ties_are_those_of_transformers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores lie on coarse grids, so that many are equal, at the k-th and where top_p cuts, too.

    Which of the equal ones transformers cuts off is its sort's choice, another on each CPU; with a stable sort, which
    ours is, the sets are the same to the last token, and the scores to the last bit.
    """
    rng = torch.Generator().manual_seed(seed)
    for _ in range(100):
        b, v = 25, int(torch.randint(2, 90, (), generator=rng))
        grid = 2.0 ** -int(torch.randint(-1, 4, (), generator=rng))
        logits = (torch.randn(b, v, generator=rng) * 2 / grid).round() * grid
        logits[int(torch.randint(b, (), generator=rng))] = 0.5  # all equal
        text = torch.randint(v, (b, 5), generator=rng)
        settings = [random_settings(rng, v) for _ in range(5)]
        rows = rows_of(settings).select(torch.arange(b) // 5)
        found = sampling.warp(sampling.penalize(logits, rows, sampling.seen_tokens(text.tolist(), v, "cpu")), rows)
        each = [*zip(logits.split(5), settings, text.split(5))]
        theirs = torch.cat([scores_of_transformers(*of_five) for of_five in each])
        assert torch.equal(found.sort().values, theirs.sort().values)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "sort", partial(torch.sort, dim=-1, stable=True))
            theirs = torch.cat([scores_of_transformers(*of_five) for of_five in each])
        assert torch.equal(found, theirs)


def test_greedy_rows_of_a_sampled_batch_take_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]]).repeat(3, 1)
    rows = rows_of([{}, {"do_sample": True, "top_k": 1}, {"repetition_penalty": 2.0}], [0, 1, 2])
    seen = torch.tensor([[False, True, True, False]]).repeat(3, 1)
    draw = torch.zeros(3, dtype=torch.int64)
    tokens = choose_tokens(logits, rows, draw, seen).tolist()
    assert tokens[0] == 1 and tokens[1] in (1, 2) and tokens[2] == 1
    seen[2, 0] = True
    logits[2] = torch.tensor([-1.0, 2.0, 2.0, 1.5])
    assert choose_tokens(logits, rows, draw, seen).tolist()[2] == 3


def test_generator_gives_the_published_numbers_of_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # from state 0
    bits = draws.random_bits(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert [x % 2**64 for x in bits.tolist()] == published
    assert [sampling_oracle.splitmix64(i * 0x9E3779B97F4A7C15) for i in range(3)] == published


@given(st.lists(st.tuples(SEEDS, st.integers(0, 10**6)), min_size=1, max_size=20))
def test_random_numbers_are_those_in_python(pairs: list[tuple[int, int]]) -> None:
    seeds, index = draws.seed_tensor([seed for seed, _ in pairs], "cpu"), torch.tensor([i for _, i in pairs])
    found = draws.uniform(seeds, index).tolist()
    assert found == [sampling_oracle.random_part(*pair) for pair in pairs]
    assert all(0 <= x < 1 for x in found)


def test_no_two_near_seeds_and_indices_share_a_number() -> None:
    """The shortest (seed, index) that the generator takes for (0, 0) is far from both (Gauss's lattice reduction)."""
    step = draws.SEED_STEP * pow(draws.INDEX_STEP, -1, 2**64) % 2**64  # seed 1 is as far as `step` draws
    short, long = (0, 2**64), (1, -step)
    while True:
        if math.hypot(*short) > math.hypot(*long):
            short, long = long, short
        m = round((short[0] * long[0] + short[1] * long[1]) / (short[0] ** 2 + short[1] ** 2))
        if m == 0:
            break
        long = (long[0] - m * short[0], long[1] - m * short[1])
    assert math.hypot(*short) > 2**31


CHI_SQUARED_999 = {1: 10.83, 9: 27.88, 19: 43.82, 63: 103.44}  # exceeded by chance once in a thousand times


@pytest.mark.parametrize("direction", ["index", "seed"])
def test_random_numbers_and_their_pairs_are_uniform(direction: str) -> None:
    n = 1 << 16
    counter, fixed = torch.arange(n), torch.full((n,), 7)
    u = draws.uniform(*((fixed, counter) if direction == "index" else (counter, fixed)))
    cells = (u * 8).long()
    pairs = torch.bincount(cells[:-1] * 8 + cells[1:], minlength=64).double()
    expected = (n - 1) / 64
    assert float(((pairs - expected) ** 2 / expected).sum()) < CHI_SQUARED_999[63]


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 2.0, "top_k": 10}, {"top_p": 0.8}, {"temperature": 0.5}], ids=lambda how: str(how)
)
def test_draws_follow_the_probabilities(how: dict[str, Any]) -> None:
    n, v = 20_000, 20
    logits = torch.randn(1, v, generator=torch.Generator().manual_seed(3))
    rows = SamplingParams.from_generate_kwargs(1, do_sample=True, seed=5, **how).rows(1, "cpu")
    probabilities = sampling.warp(logits, rows)[0].double().softmax(-1)
    many = rows.select(torch.zeros(n, dtype=torch.int64))
    tokens = choose_tokens(logits.expand(n, v), many, torch.arange(n))
    counts, expected = torch.bincount(tokens, minlength=v).double(), probabilities * n
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum() + (
        ((counts - expected)[~common].sum() ** 2 / expected[~common].sum()) if expected[~common].sum() >= 5 else 0
    )
    degrees = min(d for d in CHI_SQUARED_999 if d >= int(common.sum()) - 1)
    assert float(statistic) < CHI_SQUARED_999[degrees]


@given(st.data())
def test_tokens_are_those_drawn_in_python_and_bitwise_the_same_in_any_batch(data: st.DataObject) -> None:
    v, b = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 6))
    rng = torch.Generator().manual_seed(data.draw(SEEDS))
    scale = data.draw(st.sampled_from([0.0, 1.0, 5.0, 60.0]))
    logits = torch.randn(b, v, generator=rng) * scale
    settings = [random_settings(rng, v) if data.draw(st.booleans()) else {} for _ in range(b)]
    seeds = data.draw(st.lists(SEEDS, min_size=b, max_size=b))
    draw = torch.tensor(data.draw(st.lists(st.integers(0, 10**6), min_size=b, max_size=b)))
    seen = torch.rand(b, v, generator=rng) < 0.3
    rows = rows_of(settings, seeds)
    tokens = choose_tokens(logits, rows, draw, seen)
    order = torch.tensor(data.draw(st.permutations(range(b))))
    assert torch.equal(choose_tokens(logits[order], rows.select(order), draw[order], seen[order]), tokens[order])
    for i, how in enumerate(settings):
        alone = rows_of([how], [seeds[i]])  # computes only what this row asks for
        (token,) = choose_tokens(logits[i : i + 1].clone(), alone, draw[i : i + 1], seen[i : i + 1])
        assert token == tokens[i]
        scores = sampling.warp(sampling.penalize(logits[i : i + 1], alone, seen[i : i + 1]), alone)[0]
        expected = sampling_oracle.draw_token(scores.softmax(-1), seeds[i], int(draw[i])) if how else scores.argmax()
        assert token == expected


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_scores_that_are_no_numbers_choose_nothing(wrong: float) -> None:
    logits = torch.randn(4, 9)
    logits[1:3] = wrong if wrong < 0 else logits[1:3]
    logits[1:3, 4] = wrong
    rows = rows_of([{"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_k": 3, "top_p": 0.5}, {}, {}])
    tokens = choose_tokens(logits, rows, torch.zeros(4, dtype=torch.int64)).tolist()
    assert tokens[1] == NO_TOKEN and tokens[0] >= 0 and tokens[3] == int(logits[3].argmax())
    assert (tokens[2] == NO_TOKEN) == math.isnan(wrong)


def test_seen_tokens_are_noted_in_place() -> None:
    seen = sampling.seen_tokens([[1, 1, 4], [], [9, 0]], 5, "cpu")
    assert seen.nonzero().tolist() == [[0, 1], [0, 4], [2, 0]]
    sampling.mark_seen(seen, torch.tensor([2, NO_TOKEN, 0]))
    assert seen.nonzero().tolist() == [[0, 1], [0, 2], [0, 4], [2, 0]]


def test_params_say_what_no_static_step_serves() -> None:
    def listen(ids: Any, scores: Any) -> Any:
        return scores

    given: dict[str, Any] = {"do_sample": True, "top_p": 0.5, "repetition_penalty": 1.5, "eos_token_id": [1, 2]}
    assert SamplingParams.from_generate_kwargs(2, **given).needs_scores == ""
    assert SamplingParams.from_generate_kwargs(2, logits_processor=[listen]).needs_scores == "logits_processor"  # pyright: ignore[reportArgumentType]
    both: Any = {"logits_processor": [listen], "stopping_criteria": [listen]}
    assert SamplingParams.from_generate_kwargs(2, **both).needs_scores == "logits_processor and stopping_criteria"
    with pytest.raises(ValueError, match="2 seeds for 3 sequences"):
        SamplingParams.from_generate_kwargs(2, do_sample=True).rows(3, "cpu")
