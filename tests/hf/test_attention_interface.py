"""Models of transformers under `attn_implementation="vila_triton"` answer as under their own attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_hugging_face import CLASSES, random_ids, small_model
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
)

from bench.correctness.error_budget import unit_roundoff
from vila_triton.hf import install
from vila_triton.hf.attention_interface import attention
from vila_triton.hf.generation import CACHE_KEY
from vila_triton.ops import decode_attention, prefill_attention
from vila_triton.registry import count_calls, use

install()
OURS: dict[str, Any] = {"attn_implementation": "vila_triton"}
IDS = random_ids(3, 9)
PADDED = torch.ones_like(IDS)  # on the left, not at all, and in the middle
PADDED[0, :4] = PADDED[2, 5] = 0
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 2},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "none": {"use_cache": False},
}


@pytest.fixture(scope="module", params=CLASSES)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model with eager attention, and the same with ours."""
    return small_model(request.param), small_model(request.param, **OURS)


def answer(model: Any, mask: Tensor, new_tokens: int = 10, **how: Any) -> Tensor:
    ids = IDS[: len(mask)].masked_fill(mask == 0, 0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **how)


@pytest.mark.parametrize("cache", CACHES)
def test_greedy_answers_are_those_of_eager_attention(models: tuple[Any, Any], cache: str) -> None:
    theirs, ours = models
    for mask in [PADDED[1:2]] if cache == "drafts" else [PADDED, PADDED[1:2]]:
        with count_calls() as calls:
            found = answer(ours, mask, **CACHES[cache])
        assert torch.equal(found, answer(theirs, mask, **CACHES[cache]))
        assert len(found[:, 9:].unique()) > 2 * len(found)
        assert ("prefill_attention", "aten") in calls and "reference" not in {impl for _, impl in calls}
        assert (("decode_attention", "aten") in calls) == (cache != "none")


@pytest.mark.parametrize("how", [{"prefill_chunk_size": 5}, {"cache_implementation": "static"}], ids=str)
def test_kernels_answer_as_eager_attention_where_a_row_is_a_page(models: tuple[Any, Any], how: dict) -> None:
    theirs, ours = models
    with use(prefill_attention="triton", decode_attention="triton"):
        assert torch.equal(answer(ours, PADDED, 2, **how), answer(theirs, PADDED, 2, **how))


@torch.no_grad()
def test_logits_are_as_near_to_those_in_float64_as_eager_attention_brings_them() -> None:
    """Within twice its error and one rounding, at every token that is no padding."""
    for kind in CLASSES:
        exact = small_model(kind, torch.float64, attn_implementation="sdpa")  # eager attention to nothing is not finite
        theirs, ours = small_model(kind), small_model(kind, **OURS)
        for mask in (PADDED, PADDED.flip(1)):
            truth, eager, found = (m(IDS, attention_mask=mask).logits[mask > 0] for m in (exact, theirs, ours))
            budget = 2 * (eager - truth).abs().max() + unit_roundoff(torch.float32) * truth.abs().max()
            assert (found - truth).abs().max() <= budget < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("op", [prefill_attention, decode_attention], ids=lambda op: op.name)
def test_wrong_kernel_changes_answers(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, op: Any) -> None:
    def backwards(*args: Any, **kwargs: Any) -> Any:
        return op.reference(args[0].flip(0), *args[1:], **kwargs)

    monkeypatch.setattr(op, "impls", dict(op.impls))
    op.impl("backwards")(backwards)
    with use(**{op.name: "backwards"}):
        assert not torch.equal(answer(models[1], PADDED), answer(models[0], PADDED))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_gradients_are_those_of_eager_attention(checkpointing: bool) -> None:
    """Of labels that are predicted at a token: at padding eager attention gives numbers that mean nothing."""
    exact = small_model("llama", torch.float64, attn_implementation="sdpa")
    theirs, ours = small_model("llama"), small_model("llama")
    ours.set_attn_implementation("vila_triton")
    if checkpointing:
        ours.gradient_checkpointing_enable()
    for mask in (None, PADDED, PADDED.flip(1)):
        is_predicted = torch.ones_like(IDS) if mask is None else mask & F.pad(mask[:, :-1], (1, 0))
        labels = IDS.masked_fill(is_predicted == 0, -100)
        for model in (exact, theirs, ours):
            model.train().zero_grad()
            model(IDS, attention_mask=mask, labels=labels).loss.backward()
        for truth, eager, found in zip(*(m.parameters() for m in (exact, theirs, ours))):
            error = (eager.grad - truth.grad).abs().max() + unit_roundoff(torch.float32) * truth.grad.abs().max()
            assert (found.grad - truth.grad).abs().max() <= 4 * error


def test_gradient_behind_cached_tokens_is_refused_when_it_is_asked_for(models: tuple[Any, Any]) -> None:
    ours = models[1]
    for new in (1, 2):
        logits = ours(IDS[:, :new], **{CACHE_KEY: ours(IDS)[CACHE_KEY]}).logits
        torch.testing.assert_close(logits[:, 0], models[0](torch.cat((IDS, IDS[:, :new]), 1)).logits[:, 9])
        with pytest.raises(RuntimeError, match="keys and values of a cache have no gradient here"):
            logits.sum().backward()


@torch.no_grad()
def test_rows_of_a_cache_are_pages_where_they_lie(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of them is made, and strides, of which kernels are compiled, are the same at every length."""
    ours, read, strides = models[1], set[int](), set[Any]()

    def spy(q: Tensor, kv: Any, *args: Any, **kwargs: Any) -> Any:
        read.add(kv.k_pages.data_ptr())
        strides.add((q.stride(), kv.page_size, kv.k_pages.stride(), kv.v_pages.stride(), kv.block_table.stride(1)))
        return decode_attention.reference(q, kv, *args, **kwargs)

    monkeypatch.setattr(decode_attention, "impls", dict(decode_attention.impls))
    decode_attention.impl("spy")(spy)
    for cache in (DynamicCache(config=ours.config), StaticCache(config=ours.config, max_cache_len=16)):
        layers: Any = cache.layers
        tokens = IDS
        for _ in range(4):
            read.clear()
            with use(decode_attention="spy"):
                tokens = ours(tokens, **{CACHE_KEY: cache}).logits[:, -1:].argmax(-1)
        assert read == {layer.keys.data_ptr() for layer in layers}
    assert len(strides) == 1


def sliding() -> Any:
    return small_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, **OURS)(IDS)


def dropout() -> Any:
    return small_model("llama", attention_dropout=0.1, **OURS).train()(IDS)


def call(**arguments: Any) -> Callable[[], Any]:
    return lambda: small_model("llama", **OURS)(IDS, **arguments)


def call_attention(**arguments: Any) -> Callable[[], Any]:
    return lambda: attention(torch.nn.Module(), KEY, KEY, KEY, None, **arguments)


QUERY, KEY = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
REFUSED: dict[str, Callable[[], Any]] = {
    "a sliding window or chunks of 4 tokens": sliding,
    "dropout of 0.1 .config.attention_dropout = 0": dropout,
    "a mask of the caller, torch.bool .3, 1, 9, 9.": call(attention_mask=torch.ones(3, 1, 9, 9).bool()),
    "a mask of another form, as of packed": call(position_ids=torch.arange(9)[None] % 4, use_cache=False),
    "attention weights that output_attentions": call(output_attentions=True),
    "a cap of the scores": call_attention(softcap=30.0),
    "attention sinks": call_attention(s_aux=torch.zeros(2)),
    "a sliding window;": call_attention(sliding_window=8),
    "a position bias": call_attention(position_bias=torch.zeros(1)),
    "cross-attention or grouped": lambda: attention(torch.nn.Module(), QUERY, KEY, KEY, None, is_causal=False),
    "attention of all tokens to all with padding": lambda: small_model("llama", is_causal=False, **OURS)(
        IDS, attention_mask=PADDED
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_attention_is_refused_by_name(reason: str) -> None:
    with pytest.raises(ValueError, match=f"and not .*{reason}"):
        REFUSED[reason]()


@torch.no_grad()
def test_vision_towers_run_encoder_attention() -> None:
    config = SiglipVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config.image_size = config.patch_size = 28
    config.image_size *= 3
    torch.manual_seed(0)
    tower = SiglipVisionModel(config).eval()
    pixels = torch.randn(2, 3, 84, 84)
    expected = tower(pixels).last_hidden_state
    tower.set_attn_implementation("vila_triton")
    with count_calls() as calls:
        torch.testing.assert_close(tower(pixels).last_hidden_state, expected)
    assert calls["encoder_attention", "aten"] == 2


def test_names_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install()  # a second time
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "vila_triton", print)
    monkeypatch.delitem(AttentionInterface._global_mapping, "vila_triton")
    with pytest.raises(ValueError, match=r"transformers has another attention mask 'vila_triton' already: .*print"):
        install()
    assert "vila_triton" not in AttentionInterface._global_mapping
