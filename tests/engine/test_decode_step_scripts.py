"""The static step against the open loop, over scripts of answers that share a cache."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_scripts import Script, play, scripts
from hf_reference import build
from hypothesis import given

from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine import engine
from vila_triton.engine.sampling import SamplingParams
from vila_triton.models.params import tree_map
from vila_triton.models.vila import Vila

MODEL = build(dtype=torch.float32, seed=2, gain=2.0)


@given(scripts())
def test_static_steps_give_the_tokens_logits_and_pages_of_the_open_loop(script: Script) -> None:
    found, expected = play(MODEL, script), play(MODEL, script, opens=True)
    assert found.heard == expected.heard
    assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))
    assert found.contents.keys() == expected.contents.keys()
    for seq, tensors in found.contents.items():
        assert all(torch.equal(*pair) for pair in zip(tensors, expected.contents[seq], strict=True))
    assert found.free_pages == expected.free_pages


def answer(p: Vila, cache: PagedKVCache, **how: Any) -> list[int]:
    """The tokens of an answer of a model whose vocabulary is as long as its embedding."""
    llm = replace(MODEL.vila_config.llm, vocab_size=len(p.llm.embedding))
    cfg, seq = replace(MODEL.vila_config, llm=llm), cache.allocator.add_sequence()
    sampling = SamplingParams.from_generate_kwargs(1, max_new_tokens=8, **how)
    return [x for _, x in engine.generate_tokens(p, {seq: torch.tensor([1, 5, 7])}, cfg, cache, None, sampling)]


@pytest.mark.parametrize("how", [{}, {"repetition_penalty": 1.2}, {"eos_token_id": 50}], ids=str)
def test_models_of_two_vocabularies_share_a_cache(how: dict[str, Any]) -> None:
    vocab_size = MODEL.vila_config.llm.vocab_size
    fewer = tree_map(lambda x: x[:40] if len(x) == vocab_size else x, MODEL.params)
    caches = [MODEL.new_cache(0) for _ in range(3)]
    for cache in caches:
        cache.add_pages(4)
    expected = [answer(fewer, caches[0], **how), answer(MODEL.params, caches[1], **how)]
    assert [answer(p, caches[2], **how) for p in (fewer, MODEL.params)] == expected
