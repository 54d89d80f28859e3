"""`PagedCache`, for a model of one's own: every sequence reads back the tokens that were appended to it."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from vila_triton import PagedCache
from vila_triton.cache.page_allocator import OutOfPages
from vila_triton.cache.paged_tensors import PagedStep
from vila_triton.ops import KVPages, kv_write
from vila_triton.ops.kv_pages import quantize_kv

SIZES: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
KINDS = st.sampled_from(["append", "append", "fork", "truncate", "free", "fail"])
ACTIONS = st.lists(st.tuples(KINDS, st.integers(0, 99)), min_size=6, max_size=20)


def write(step: PagedStep, rng: torch.Generator) -> Tensor:
    """Write random keys and their negatives as values into every layer, and return the keys [layers, s, g, d]."""
    k = torch.randn(2, len(step.slot_mapping), 2, 8, generator=rng)
    for layer in range(2):
        kv = step.layer(layer)
        kv_write(k[layer], -k[layer], kv.k_pages, kv.v_pages, step.slot_mapping)
    return k


def as_held(x: Tensor, pages: KVPages) -> Tensor:
    """x as it is read back from such pages."""
    held = quantize_kv(x, pages)
    return held if isinstance(held, Tensor) else held.dequantize()


def check(step: PagedStep, tokens: dict[int, Tensor]) -> None:
    """Every row of the step's block table leads to the tokens of its sequence."""
    for row, held in enumerate(tokens.values()):
        for layer in range(2):
            keys, values = step.layer(layer).gather(row, held.shape[1])
            assert torch.equal(keys, as_held(held[layer], step.k_pages))
            assert torch.equal(values, as_held(-held[layer], step.v_pages))


@example(torch.float32, 4, [("append", 3), ("fork", 0), ("append", 1), ("fail", 1)], 0)  # copies a page
@given(st.sampled_from([torch.float32, "int8", "int4"]), st.sampled_from([1, 4, 16]), ACTIONS, st.integers(0, 2**16))
def test_sequences_hold_what_was_appended(
    dtype: torch.dtype | str, page_size: int, actions: list[tuple[str, int]], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    cache = PagedCache(400, **SIZES, page_size=page_size, dtype=dtype)
    seqs = cache.allocator
    tokens = {seqs.add_sequence(): torch.empty(2, 0, 2, 8) for _ in range(2)}
    for action, number in actions:
        seq = list(tokens)[number % len(tokens)]
        if action == "fork" and len(tokens) < 5:
            tokens[seqs.fork(seq)] = tokens[seq]
        elif action == "truncate":
            tokens[seq] = tokens[seq][:, : number % (cache.length(seq) + 1)]
            seqs.truncate(seq, tokens[seq].shape[1])
        elif action == "free" and len(tokens) > 1:
            seqs.free_sequence(seq)
            del tokens[seq]
        else:
            counts = {s: (number + i) % 7 for i, s in enumerate(tokens)}
            context = [x.shape[1] for x in tokens.values()]
            try:
                with cache.append_step(counts) as step:
                    new = write(step, rng).split(list(counts.values()), 1)
                    if action == "fail":
                        raise InterruptedError
                tokens = {s: torch.cat((tokens[s], x), 1) for s, x in zip(counts, new)}
            except InterruptedError:
                assert [cache.length(s) for s in counts] == context
                continue
            assert step.context_lens.tolist() == context
            assert step.seq_lens.tolist() == [cache.length(s) for s in counts] == [x.shape[1] for x in tokens.values()]
            assert step.positions.tolist() == [t for c, n in zip(context, counts.values()) for t in range(c, c + n)]
            assert step.batch.query_start_loc.diff().tolist() == list(counts.values())
            check(step, tokens)
    with cache.append_step(dict.fromkeys(tokens, 0)) as step:
        check(step, tokens)
    for seq in tokens:
        seqs.free_sequence(seq)
    assert seqs.num_available_pages == 400


def test_steps_that_cannot_be_are_refused_and_change_nothing() -> None:
    cache = PagedCache(3, **SIZES, page_size=4)
    a = cache.allocator.add_sequence()
    with cache.append_step({a: 6}):
        pass
    refused: list[tuple[type[Exception], str, dict[int, int]]] = [
        (OutOfPages, "2 more pages of 4 tokens are needed, but 1 of 3 are free", {a: 7}),
        (KeyError, r"no sequence 9 in the cache; there are: \[0\]", {a: 1, 9: 1}),
        (ValueError, "cannot append -1 tokens to sequence 0", {a: -1}),
        (ValueError, "counts are empty, expected one sequence at least", {}),
    ]
    for kind, message, counts in refused:
        with pytest.raises(kind, match=message), cache.append_step(counts):
            raise AssertionError("the step was not refused")
        assert cache.length(a) == 6 and cache.allocator.num_available_pages == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0, expected 1 at least"),
        ({"num_kv_heads": -1}, "num_kv_heads is -1"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"page_size": 0}, "page_size >= 1, got 3 and 0"),
        ({"dtype": torch.int32}, "dtype is torch.int32, expected a floating-point one, 'int8' or 'int4'"),
        ({"dtype": "float8"}, "no pages in 'float8'"),
        ({"dtype": "int4", "head_dim": 7}, "even head dim, got 7"),
    ],
    ids=str,
)
def test_caches_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedCache(3, **{**SIZES, **changed})
