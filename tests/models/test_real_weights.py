"""Real weights: SmolLM2-135M-Instruct through our functions and kernels, beside transformers. `pytest -m real`."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import smollm2
from vila_triton.cache.paged_cache import PagedKVCache, UncachedBatch
from vila_triton.engine import engine
from vila_triton.engine.sampling import SamplingParams
from vila_triton.hf import install
from vila_triton.models import llama, vila
from vila_triton.models.config import LlamaConfig
from vila_triton.registry import OPS, count_calls, discover, use

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(smollm2.missing_packages()), reason=f"needs {', '.join(smollm2.missing_packages())}"),
]
QUESTION = "What is the capital of France, and what is it known for?"


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any, llama.Llama, LlamaConfig]:
    """Transformers' model and tokenizer, and our tree."""
    model, tokenizer = smollm2.load_hugging_face()
    return model, tokenizer, *smollm2.convert_model(model)


def prompt(tokenizer: Any, question: str = QUESTION) -> Tensor:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids[0]


def logits(p: llama.Llama, cfg: LlamaConfig, ids: Tensor) -> Tensor:
    cache = UncachedBatch([len(ids)], ids.device)
    return llama.logits(p, llama.forward(p, llama.embed(p, ids), cache.positions, cfg, cache))


def answer(p: llama.Llama, cfg: LlamaConfig, ids: Tensor, count: int, **how: Any) -> list[int]:
    """Greedy tokens through the paged cache."""
    cache = PagedKVCache(cfg, 64, dtype=torch.float32)
    rows = {cache.allocator.add_sequence(): ids}
    sampling = SamplingParams.from_generate_kwargs(1, max_new_tokens=count, **how)
    whole: Any = SimpleNamespace(llm=cfg)
    language_only = vila.Vila(p, None, None)  # pyright: ignore[reportArgumentType]
    return [t for _, t in engine.generate_tokens(language_only, rows, whole, cache, None, sampling)]


@torch.no_grad()
def test_smollm2_logits_equal_transformers(real):
    model, tokenizer, p, cfg = real
    assert (cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads) == (576, 9, 3) and p.head is None
    ids = prompt(tokenizer)
    expected = model(ids[None]).logits[0]
    found = logits(p, cfg, ids)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_smollm2_200_greedy_tokens_equal_transformers(real):
    model, tokenizer, p, cfg = real
    ids = prompt(tokenizer, "Tell me a long story about a lighthouse.")
    mask = torch.ones_like(ids[None])  # else generate hides the end of each turn, which is its padding too
    how = {"do_sample": False, "max_new_tokens": 200, "eos_token_id": None}
    expected = model.generate(ids[None], attention_mask=mask, **how)
    assert answer(p, cfg, ids, 200) == expected[0, len(ids) :].tolist()


@torch.no_grad()
def test_smollm2_kernels_equal_references_on_first_layers(real):
    _, tokenizer, p, cfg = real
    discover()
    p = llama.quantize_linears_rtn(replace(p, layers=p.layers[:2]), 32)
    ids = prompt(tokenizer)[:12]
    expected = logits(p, cfg, ids)
    chosen = {name: "triton" for name, op in OPS.items() if "triton" in op.impls} | {"int4_matmul": "packed"}
    with use(**chosen), count_calls() as calls:
        found = logits(p, cfg, ids)
    assert ("int4_matmul", "packed") in calls and ("prefill_attention", "triton") in calls
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_smollm2_int4_text_is_sensible(real):
    _, tokenizer, p, cfg = real
    found = answer(llama.quantize_linears_rtn(p, 32), cfg, prompt(tokenizer), 40, eos_token_id=tokenizer.eos_token_id)
    assert "Paris" in tokenizer.decode(found)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_smollm2_answers_as_with_sdpa_under_our_attention(real, cache: str):
    """Transformers' own model, a batch of two prompts of which the shorter is padded on the left."""
    model, tokenizer, *_ = real
    rows = [prompt(tokenizer), prompt(tokenizer, "Tell me a long story about a lighthouse and a whale.")[:-4]]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat((row.new_zeros(longest - len(row)), row)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    assert mask.min() == 0
    how = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "cache_implementation": cache}
    expected = model.generate(ids, attention_mask=mask, **how)
    install()
    try:
        model.set_attn_implementation("vila_triton")
        with count_calls() as calls:
            found = model.generate(ids, attention_mask=mask, **how)
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(found, expected)
    assert calls["decode_attention", "aten"] == 59 * 30 and calls["prefill_attention", "aten"] == 30
