"""Under the "invariant" policy not a bit of a model's logits depends on company, chunks, pages or what was cached.

Linears go row by row here, as the policy is one of attention and torch's product of matrices adds up as it likes; so
does swiglu, since torch on a CPU takes another exp for what is left of a vector.
"""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import build, words
from torch import Tensor

from vila_triton import engine
from vila_triton.cache import KV_DTYPES, PagedCache
from vila_triton.models import llama
from vila_triton.ops import linear, prefill_attention, swiglu
from vila_triton.registry import OPS, Unsupported, discover, recording, use

discover()
MODEL = build(dtype=torch.float32, seed=3, gain=2.0, llm={"head_dim": 16})
WHOLE = words(37)
OTHERS = [words(n) for n in (5, 1, 18)]
CASES = [("reference", dtype) for dtype in (None, *KV_DTYPES[1:])]
CASES += [(name, dtype) for name in prefill_attention.impls if name != "reference" for dtype in (None, "int4")]


@pytest.fixture(scope="module", autouse=True)
def row_by_row() -> Iterator[None]:
    linear.impl("row by row")(lambda x, *w: torch.cat([linear.reference(row.clone(), *w) for row in x.split(1)]))
    swiglu.impl("row by row")(lambda x, y: torch.cat([swiglu.reference(*row) for row in zip(x.split(1), y.split(1))]))
    yield
    del linear.impls["row by row"], swiglu.impls["row by row"]


def run(cache: PagedCache, seq: int, start: int, cuts: list[int], others: list[Tensor]) -> Tensor:
    """Hidden states of WHOLE from `start` on [t - start, e], in chunks; `others` go along with the first of them."""
    states = []
    for begin, end in pairwise([start, *(cut for cut in cuts if cut > start), len(WHOLE)]):
        company = {cache.table.alloc(): row for row in others} if begin == start else {}
        rows = dict(sorted({**company, seq: WHOLE[begin:end]}.items(), key=lambda item: len(item[1])))
        keep = {one: end - begin if one == seq else 0 for one in rows}
        hidden = engine.advance(MODEL.params, rows, MODEL.geometry, cache, keep=keep)
        states.append(hidden[list(rows).index(seq)])
    return torch.cat(states)


@torch.no_grad()
def logits(
    impl: str,
    kv_dtype: str | None,
    cuts: list[int],
    page_size: int = 16,
    others: list[Tensor] | None = None,
    known: int = 0,
    policy: str = "invariant",
) -> Tensor:
    """Of every token of WHOLE but the first `known`, which are adopted from a sequence that was run before."""
    how: dict[str, Any] = {"page_size": page_size, "kv_dtype": kv_dtype, "policy": policy}
    cache = PagedCache(MODEL.geometry.llm, 256, dtype=torch.float32, **how)
    random.Random(len(cuts)).shuffle(cache.table.free_pages)
    choice = {name: "reference" for name in OPS} | {"linear": "row by row", "swiglu": "row by row"}
    with use(**choice | {"prefill_attention": impl}):
        if known:
            run(cache, first := cache.table.alloc(), 0, [known], [])
            cache.table.publish(first, WHOLE[:known].tolist())
        cache.table.adopt(seq := cache.table.alloc(), WHOLE.tolist())
        assert cache.length(seq) == known
        return llama.logits(MODEL.params.llm, run(cache, seq, known, cuts, others or []))


@pytest.mark.parametrize("impl, kv_dtype", CASES)
def test_not_a_bit_of_the_logits_depends_on_how_a_sequence_is_run(impl: str, kv_dtype: str | None) -> None:
    try:
        expected = logits(impl, kv_dtype, [])
    except Unsupported as reason:
        pytest.skip(f"{impl}: {reason}")
    few = max(2, settings().max_examples // (2 if impl == "reference" else 8))

    @settings(max_examples=few)
    @given(
        cuts=st.lists(st.integers(1, 36), max_size=5, unique=True).map(sorted),
        page_size=st.sampled_from([1, 4, 16, 32, 64, 128, 256] if impl == "reference" else [16, 32, 64]),
        others=st.permutations(OTHERS).flatmap(lambda rows: st.sampled_from([rows[:n] for n in range(4)])),
        known=st.integers(0, 36),
    )
    def holds(cuts: list[int], page_size: int, others: list[Tensor], known: int) -> None:
        assert torch.equal(logits(impl, kv_dtype, cuts, page_size, others, known), expected[known:])

    holds()


def test_without_the_policy_chunks_matter_to_quantised_pages() -> None:
    whole, chunked = (logits("reference", "int4", cuts, policy="fast") for cuts in ([], [16]))
    assert torch.equal(whole[:16], chunked[:16]) and not torch.equal(whole[16:], chunked[16:])


def test_a_single_token_goes_the_way_of_a_chunk_if_policy_says_so() -> None:
    for policy, decoded in (("invariant", 0), ("fast", 2 * 3)):  # layers and tokens
        with recording() as calls:
            logits("reference", None, [34, 35, 36], policy=policy, known=34)
        assert calls["decode_attention", "reference"] == decoded
